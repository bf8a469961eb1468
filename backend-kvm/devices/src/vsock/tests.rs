//! Tests of the whole device through its registers and queues.

mod backlog;
mod driver;
mod hostile;
mod model;
mod scenarios;
