//! Under construction.

pub mod guest;
