//! `test` and `[`.

use super::{
    super::syscalls::{FdStat, Syscalls},
    Out,
};
use std::cmp::Ordering;
use vm_guest_protocol::EntryKind;

pub(super) fn test(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let mut words: Vec<&str> = argv.iter().skip(1).map(String::as_str).collect();
    if argv.first().is_some_and(|name| name == "[" || name.ends_with("/["))
        && words.pop() != Some("]")
    {
        out.error("missing ]");
        return 2;
    }
    let mut test = Test { sys, words, at: 0 };
    let result = test.whole();
    let rest = test.words.get(test.at).copied();
    match (result, rest) {
        (Ok(holds), None) => u8::from(!holds),
        (Ok(_), Some(rest)) => {
            out.error(&format!("{rest}: unknown operand"));
            2
        }
        (Err(message), _) => {
            out.error(&message);
            2
        }
    }
}

struct Test<'a, 'b> {
    sys: &'a Syscalls<'b>,
    words: Vec<&'a str>,
    at: usize,
}

impl Test<'_, '_> {
    /// Decides by the number of words where POSIX does, else by precedence.
    fn whole(&mut self) -> Result<bool, String> {
        match self.words[..] {
            [] => Ok(false),
            [word] => {
                self.at = 1;
                Ok(!word.is_empty())
            }
            ["!", word] => {
                self.at = 2;
                Ok(word.is_empty())
            }
            [left, operator, right] if is_binary(operator) => {
                self.at = 3;
                self.binary(left, operator, right)
            }
            ["!", left, operator, right] if is_binary(operator) => {
                self.at = 4;
                self.binary(left, operator, right).map(|holds| !holds)
            }
            _ => self.any(),
        }
    }

    fn any(&mut self) -> Result<bool, String> {
        let mut holds = self.all()?;
        while self.words.get(self.at) == Some(&"-o") {
            self.at += 1;
            holds |= self.all()?;
        }
        Ok(holds)
    }

    fn all(&mut self) -> Result<bool, String> {
        let mut holds = self.not()?;
        while self.words.get(self.at) == Some(&"-a") {
            self.at += 1;
            holds &= self.not()?;
        }
        Ok(holds)
    }

    fn not(&mut self) -> Result<bool, String> {
        if self.words.get(self.at) == Some(&"!") && self.at + 1 < self.words.len() {
            self.at += 1;
            return self.not().map(|holds| !holds);
        }
        self.primary()
    }

    fn primary(&mut self) -> Result<bool, String> {
        let word = *self.words.get(self.at).ok_or("argument expected")?;
        if let Some(operator) = self.words.get(self.at + 1).filter(|it| is_binary(it)) {
            let right = *self.words.get(self.at + 2).ok_or("argument expected")?;
            self.at += 3;
            return self.binary(word, operator, right);
        }
        if word == "(" {
            self.at += 1;
            let holds = self.any()?;
            if self.words.get(self.at) != Some(&")") {
                return Err("closing paren expected".to_owned());
            }
            self.at += 1;
            return Ok(holds);
        }
        self.at += 1;
        if word.len() == 2
            && word.starts_with('-')
            && let Some(operand) = self.words.get(self.at)
        {
            self.at += 1;
            return self.unary(word, operand);
        }
        Ok(!word.is_empty())
    }

    fn unary(&self, operator: &str, operand: &str) -> Result<bool, String> {
        let stat = |follow| self.sys.stat(operand, follow).ok();
        let is = |kind| stat(true).is_some_and(|it| it.kind == kind);
        Ok(match operator {
            "-n" => !operand.is_empty(),
            "-z" => operand.is_empty(),
            "-e" => stat(true).is_some(),
            "-f" => is(EntryKind::File),
            "-d" => is(EntryKind::Directory),
            "-c" => is(EntryKind::Other),
            "-b" | "-p" | "-S" => false,
            "-h" | "-L" => stat(false).is_some_and(|it| it.kind == EntryKind::Symlink),
            "-s" => stat(true).is_some_and(|it| it.size > 0),
            "-u" => stat(true).is_some_and(|it| it.mode & 0o4000 != 0),
            "-g" => stat(true).is_some_and(|it| it.mode & 0o2000 != 0),
            "-k" => stat(true).is_some_and(|it| it.mode & 0o1000 != 0),
            "-O" => stat(true).is_some_and(|it| it.uid == self.sys.uid()),
            "-G" => stat(true).is_some_and(|it| it.gid == self.sys.gid()),
            "-r" => self.sys.access(operand, 4).is_ok(),
            "-w" => self.sys.access(operand, 2).is_ok(),
            "-x" => self.sys.access(operand, 1).is_ok(),
            "-t" => {
                let fd = operand.parse().map_err(|_| format!("{operand}: bad number"))?;
                self.sys.fstat(fd) == Ok(FdStat::Terminal)
            }
            other => return Err(format!("{other}: unknown operand")),
        })
    }

    fn binary(&self, left: &str, operator: &str, right: &str) -> Result<bool, String> {
        let number =
            |text: &str| text.trim().parse::<i64>().map_err(|_| format!("{text}: bad number"));
        let order = || Ok::<_, String>(number(left)?.cmp(&number(right)?));
        let modified = |path: &str| self.sys.stat(path, true).ok().map(|it| it.modified_ns);
        Ok(match operator {
            "=" | "==" => left == right,
            "!=" => left != right,
            "<" => left < right,
            ">" => left > right,
            "-eq" => order()? == Ordering::Equal,
            "-ne" => order()? != Ordering::Equal,
            "-lt" => order()? == Ordering::Less,
            "-le" => order()? != Ordering::Greater,
            "-gt" => order()? == Ordering::Greater,
            "-ge" => order()? != Ordering::Less,
            "-nt" => modified(left) > modified(right),
            "-ot" => modified(left) < modified(right),
            other => return Err(format!("{other}: unknown operand")),
        })
    }
}

fn is_binary(word: &str) -> bool {
    matches!(
        word,
        "=" | "=="
            | "!="
            | "<"
            | ">"
            | "-eq"
            | "-ne"
            | "-lt"
            | "-le"
            | "-gt"
            | "-ge"
            | "-nt"
            | "-ot"
    )
}
