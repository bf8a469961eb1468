//! The twinvm guest agent: a state machine over a guest's system calls, and its Linux form.
//!
//! [`core::AgentCore`] is the agent itself: it speaks the protocol, starts programs, moves their input and output, and
//! works on files. It does no I/O of its own and has no clock; [`os::GuestOs`] is all it knows of its kernel. A
//! driver brings it bytes from connections and carries its bytes back:
//!
//! 1. [`connected`](core::AgentCore::connected), [`received`](core::AgentCore::received) and
//!    [`disconnected`](core::AgentCore::disconnected) as the connections go;
//! 2. [`advance`](core::AgentCore::advance) when a child may have output, room for input or an end, and when
//!    [`next_deadline`](core::AgentCore::next_deadline) is reached;
//! 3. after either, send what [`outgoing`](core::AgentCore::outgoing) holds, and close what
//!    [`to_close`](core::AgentCore::to_close) names.
//!
//! The core is plain data: it can be cloned and serialised at any point, which is how a simulated guest is
//! snapshotted and forked.
#![cfg_attr(not(feature = "linux"), forbid(unsafe_code))]
#![cfg_attr(feature = "linux", deny(unsafe_code))]

pub mod core;
#[cfg(all(target_os = "linux", feature = "linux"))]
pub mod linux;
pub mod os;
