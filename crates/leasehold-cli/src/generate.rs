//! Shell completions and manual pages, made from the flags themselves.

use std::io::{self, Write as _};
use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Cli;

/// Prints the completions for `shell`.
pub(crate) fn completions(shell: Shell) -> io::Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "leasehold", &mut text);
    io::stdout().lock().write_all(&text)?;
    Ok(0)
}

/// Prints the main manual page, or writes all of them into `folder`.
pub(crate) fn man(folder: Option<&Path>) -> io::Result<u8> {
    match folder {
        Some(folder) => clap_mangen::generate_to(Cli::command(), folder)?,
        None => clap_mangen::Man::new(Cli::command()).render(&mut io::stdout().lock())?,
    }
    Ok(0)
}
