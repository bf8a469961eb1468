//! Under test.
