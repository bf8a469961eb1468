//! Runs to measure by.
