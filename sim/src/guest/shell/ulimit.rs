//! The builtin command `ulimit`.

use super::{Shell, run::Frame};
use crate::guest::syscalls::Syscalls;
use vm_guest_protocol::ResourceLimit;

/// Option, number of the resource, and by how much the command's unit is more than the kernel's.
const OPTIONS: [(char, u8, u64); 14] = [
    ('t', 0, 1),
    ('f', 1, 512),
    ('d', 2, 1024),
    ('s', 3, 1024),
    ('c', 4, 512),
    ('m', 5, 1024),
    ('p', 6, 1),
    ('n', 7, 1),
    ('l', 8, 1024),
    ('v', 9, 1024),
    ('w', 10, 1),
    ('i', 11, 1),
    ('e', 13, 1),
    ('r', 14, 1),
];

const NONE: u64 = ResourceLimit::NONE;

impl Shell {
    /// Shows or sets limits of the shell's own process.
    pub(super) fn ulimit(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        let (mut hard, mut soft, mut all) = (false, false, false);
        let (mut chosen, mut value) = (OPTIONS[1], None);
        for argument in arguments {
            let Some(letters) = argument.strip_prefix('-').filter(|it| !it.is_empty()) else {
                value = Some(argument.as_str());
                continue;
            };
            for letter in letters.chars() {
                match letter {
                    'H' => hard = true,
                    'S' => soft = true,
                    'a' => all = true,
                    letter => match OPTIONS.iter().find(|(known, _, _)| *known == letter) {
                        Some(option) => chosen = *option,
                        None => return self.refuse_limit(&format!("invalid option -- '{letter}'")),
                    },
                }
            }
        }
        if let Some(value) = value {
            // Without either, both are set.
            let both = hard == soft;
            return self.set_limit(sys, chosen, value, (soft || both, hard || both));
        }
        let shown: &[_] = if all { &OPTIONS } else { std::slice::from_ref(&chosen) };
        for (letter, resource, unit) in shown {
            let (low, high) = sys.limit(*resource);
            let amount = match if hard { high } else { low } {
                NONE => "unlimited".to_owned(),
                amount => (amount / unit).to_string(),
            };
            let line = if all { format!("-{letter} {amount}") } else { amount };
            self.out.line(&line);
        }
        self.stack.push(Frame::Flush);
    }

    fn set_limit(
        &mut self,
        sys: &mut Syscalls<'_>,
        (_, resource, unit): (char, u8, u64),
        value: &str,
        (soft, hard): (bool, bool),
    ) {
        let amount = match value {
            "unlimited" => Some(NONE),
            value => value.parse::<u64>().ok().and_then(|it| it.checked_mul(unit)),
        };
        let Some(amount) = amount else {
            return self.refuse_limit(&format!("bad number: {value}"));
        };
        let (low, high) = sys.limit(resource);
        let pair = (if soft { amount } else { low }, if hard { amount } else { high });
        if sys.set_limit(resource, pair).is_err() {
            self.refuse_limit("error setting limit: Operation not permitted");
        }
    }

    fn refuse_limit(&mut self, why: &str) {
        self.complain(&format!("ulimit: {why}"));
        self.status = 1;
    }
}
