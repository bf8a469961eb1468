//! The core above machines and agents that mean it ill.

mod captures;
mod damaged_image;
mod frames;
mod hostile_agent;
mod hostile_machine;
mod machine;
mod refusals;
mod scripted_agent;
mod session;
mod told;
