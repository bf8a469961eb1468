//! The real guest agent as an ordinary host process, for tests.
