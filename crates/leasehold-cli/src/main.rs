//! `leasehold`: runs a command while holding a distributed lock, and shows who holds what.

mod args;
mod child;
mod cli;
mod doctor;
mod exit;
mod generate;
mod graph;
mod ls;
mod plan;
mod run;
mod show;
mod status;
mod view;

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(cli::main(std::env::args_os().collect()))
}
