//! `$((…))`.

/// What an expression reads and changes.
pub(super) trait Variables {
    fn get(&self, name: &str) -> String;
    fn set(&mut self, name: &str, value: String) -> Result<(), String>;
}

const MAX_DEPTH: u32 = 60;
/// Binary operators from the loosest to the tightest; longer ones first within a level.
const LEVELS: [&[&str]; 10] = [
    &["||"],
    &["&&"],
    &["|"],
    &["^"],
    &["&"],
    &["==", "!="],
    &["<=", ">=", "<", ">"],
    &["<<", ">>"],
    &["+", "-"],
    &["*", "/", "%"],
];
const ASSIGNMENTS: [&str; 11] = ["<<=", ">>=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "="];

/// Computes an expression.
pub(super) fn evaluate(text: &str, variables: &mut dyn Variables) -> Result<i64, String> {
    let mut it = Evaluator { rest: text, variables, depth: 0, active: true };
    it.blanks();
    if it.rest.is_empty() {
        return Ok(0);
    }
    let value = it.assignment()?;
    if it.rest.is_empty() { Ok(value) } else { Err("arithmetic syntax error".to_owned()) }
}

struct Evaluator<'a, 'b> {
    rest: &'a str,
    variables: &'b mut dyn Variables,
    depth: u32,
    /// Off in a branch that is not taken: nothing is assigned and no division fails there.
    active: bool,
}

impl<'a> Evaluator<'a, '_> {
    fn blanks(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn accept(&mut self, operator: &str) -> bool {
        let Some(rest) = self.rest.strip_prefix(operator) else { return false };
        self.rest = rest;
        self.blanks();
        true
    }

    fn name(&self) -> Option<&'a str> {
        let starts = self.rest.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic());
        let is_part = |c: char| c == '_' || c.is_ascii_alphanumeric();
        let end = self.rest.find(|c: char| !is_part(c)).unwrap_or(self.rest.len());
        starts.then(|| &self.rest[..end])
    }

    fn assignment(&mut self) -> Result<i64, String> {
        if let Some(name) = self.name() {
            let after = self.rest[name.len()..].trim_start();
            let operator = ASSIGNMENTS.iter().find(|operator| after.starts_with(**operator));
            if let Some(operator) = operator
                && !after.starts_with("==")
            {
                self.rest = after[operator.len()..].trim_start();
                let right = self.deeper(Self::assignment)?;
                let value = match operator.strip_suffix('=') {
                    None | Some("") => right,
                    Some(binary) => {
                        let left = self.variable(name)?;
                        self.apply(binary, left, right)?
                    }
                };
                if self.active {
                    self.variables.set(name, value.to_string())?;
                }
                return Ok(value);
            }
        }
        self.ternary()
    }

    fn deeper<T>(
        &mut self,
        parse: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("expression nested too deeply".to_owned());
        }
        let result = parse(self);
        self.depth -= 1;
        result
    }

    fn when<T>(
        &mut self,
        active: bool,
        parse: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        let before = self.active;
        self.active &= active;
        let result = parse(self);
        self.active = before;
        result
    }

    fn ternary(&mut self) -> Result<i64, String> {
        let condition = self.binary(0)?;
        if !self.accept("?") {
            return Ok(condition);
        }
        let holds = condition != 0;
        let then = self.when(holds, |it| it.deeper(Self::assignment))?;
        if !self.accept(":") {
            return Err("arithmetic syntax error".to_owned());
        }
        let otherwise = self.when(!holds, |it| it.deeper(Self::ternary))?;
        Ok(if holds { then } else { otherwise })
    }

    fn binary(&mut self, level: usize) -> Result<i64, String> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.binary(level + 1)?;
        while let Some(operator) = operators.iter().find(|operator| self.is_next(operator)) {
            self.accept(operator);
            left = match *operator {
                "||" => {
                    let right = self.when(left == 0, |it| it.binary(level + 1))?;
                    i64::from(left != 0 || right != 0)
                }
                "&&" => {
                    let right = self.when(left != 0, |it| it.binary(level + 1))?;
                    i64::from(left != 0 && right != 0)
                }
                operator => {
                    let right = self.binary(level + 1)?;
                    self.apply(operator, left, right)?
                }
            };
        }
        Ok(left)
    }

    /// Says whether this operator, and no longer one that begins with it, comes next.
    fn is_next(&self, operator: &str) -> bool {
        let Some(after) = self.rest.strip_prefix(operator) else { return false };
        match operator {
            "|" | "&" => !after.starts_with(operator) && !after.starts_with('='),
            "<" | ">" => !after.starts_with(operator),
            "<<" | ">>" | "^" | "+" | "-" | "*" | "/" | "%" => !after.starts_with('='),
            _ => true,
        }
    }

    fn apply(&self, operator: &str, left: i64, right: i64) -> Result<i64, String> {
        let shift = u32::try_from(right & 63).unwrap_or(0);
        Ok(match operator {
            "|" => left | right,
            "^" => left ^ right,
            "&" => left & right,
            "==" => i64::from(left == right),
            "!=" => i64::from(left != right),
            "<=" => i64::from(left <= right),
            ">=" => i64::from(left >= right),
            "<" => i64::from(left < right),
            ">" => i64::from(left > right),
            "<<" => left.wrapping_shl(shift),
            ">>" => left.wrapping_shr(shift),
            "+" => left.wrapping_add(right),
            "-" => left.wrapping_sub(right),
            "*" => left.wrapping_mul(right),
            "/" | "%" if right == 0 && self.active => return Err("divide by zero".to_owned()),
            "/" => left.checked_div(right).unwrap_or(left),
            "%" => left.checked_rem(right).unwrap_or(0),
            _ => return Err("arithmetic syntax error".to_owned()),
        })
    }

    fn unary(&mut self) -> Result<i64, String> {
        self.blanks();
        for (operator, apply) in [
            ("-", i64::wrapping_neg as fn(i64) -> i64),
            ("+", |value| value),
            ("~", |value| !value),
            ("!", |value| i64::from(value == 0)),
        ] {
            if self.accept(operator) {
                return self.deeper(Self::unary).map(apply);
            }
        }
        if self.accept("(") {
            let value = self.deeper(Self::assignment)?;
            if !self.accept(")") {
                return Err("arithmetic syntax error".to_owned());
            }
            return Ok(value);
        }
        if let Some(name) = self.name() {
            self.rest = &self.rest[name.len()..];
            self.blanks();
            return self.variable(name);
        }
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        self.blanks();
        number(digits)
    }

    fn variable(&mut self, name: &str) -> Result<i64, String> {
        let value = self.variables.get(name);
        let text = value.trim();
        if text.is_empty() {
            return Ok(0);
        }
        match text.strip_prefix('-') {
            Some(digits) => number(digits).map(i64::wrapping_neg),
            None => number(text.strip_prefix('+').unwrap_or(text)),
        }
        .map_err(|_| "arithmetic syntax error".to_owned())
    }
}

fn number(digits: &str) -> Result<i64, String> {
    let (digits, radix) = match digits {
        hex if hex.starts_with("0x") || hex.starts_with("0X") => (&hex[2..], 16),
        octal if octal.len() > 1 && octal.starts_with('0') => (&octal[1..], 8),
        plain => (plain, 10),
    };
    i64::from_str_radix(digits, radix).map_err(|_| "arithmetic syntax error".to_owned())
}
