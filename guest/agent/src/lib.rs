//! The twinvm guest agent: a state machine over a guest's system calls, and its Linux form.
#![forbid(unsafe_code)]

pub mod os;
