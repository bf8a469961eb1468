//! Kernels and initial file systems for twinvm's real machines, with the static guest agent.
#![forbid(unsafe_code)]
