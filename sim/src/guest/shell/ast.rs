//! What a script says.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A command of any kind.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Command {
    Simple(Simple),
    Pipeline {
        negate: bool,
        stages: Vec<Arc<Command>>,
    },
    And(Arc<Command>, Arc<Command>),
    Or(Arc<Command>, Arc<Command>),
    /// Commands in order, each with whether it runs in the background.
    List(Vec<(Arc<Command>, bool)>),
    If {
        condition: Arc<Command>,
        then: Arc<Command>,
        otherwise: Option<Arc<Command>>,
    },
    While {
        condition: Arc<Command>,
        body: Arc<Command>,
        until: bool,
    },
    For {
        name: String,
        words: Option<Vec<Word>>,
        body: Arc<Command>,
    },
    Case {
        word: Word,
        arms: Vec<Arm>,
    },
    Subshell(Arc<Command>),
    Function {
        name: String,
        body: Arc<Command>,
    },
    Redirected {
        body: Arc<Command>,
        redirections: Vec<Redirection>,
    },
}

/// A program or builtin with its arguments.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Simple {
    pub(super) assignments: Vec<(String, Word)>,
    pub(super) words: Vec<Word>,
    pub(super) redirections: Vec<Redirection>,
}

/// Patterns of a `case`, and what to do when one matches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Arm {
    pub(super) patterns: Vec<Word>,
    pub(super) body: Option<Arc<Command>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Redirection {
    pub(super) fd: u32,
    pub(super) kind: RedirectionKind,
    pub(super) target: Word,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum RedirectionKind {
    Read,
    Write,
    Append,
    ReadWrite,
    /// `<&` and `>&`: the target is a descriptor or `-`.
    Duplicate,
    /// `&>`: both outputs.
    Both,
    /// `<<`: the target is the text.
    Here,
}

/// A word before it is expanded.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Word(pub(super) Vec<Part>);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Part {
    /// Text in which pattern characters count.
    Plain(String),
    /// Text in which they do not. An empty one makes the word count as given.
    Quoted(String),
    Parameter {
        name: String,
        action: Action,
        quoted: bool,
    },
    Substitution {
        command: Arc<Command>,
        quoted: bool,
    },
    Arithmetic {
        expression: Word,
        quoted: bool,
    },
    /// `~` at the beginning of a word.
    Home,
}

/// What is done with a parameter's value. The flag says that an empty value counts as none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Action {
    Value,
    Length,
    Default(bool, Word),
    Assign(bool, Word),
    Alternative(bool, Word),
    Require(bool, Word),
    /// Cuts a pattern's match off the beginning; the flag asks for the longest.
    CutStart(bool, Word),
    CutEnd(bool, Word),
}

impl Word {
    /// Gives the text of a word in which nothing was quoted or expanded.
    pub(super) fn plain(&self) -> Option<&str> {
        match &self.0[..] {
            [Part::Plain(text)] => Some(text),
            _ => None,
        }
    }
}
