//! A wall clock that can be stepped, for one process: its timers and all other processes keep theirs.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A wall clock for processes that are started with it. Right until it is moved.
#[derive(Debug)]
pub struct WallClock {
    folder: PathBuf,
}

impl WallClock {
    /// Makes one, with its files in `folder`. Needs `cc`.
    ///
    /// # Panics
    /// If there is no `cc`, with the line that gets it.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        std::fs::write(folder.join("wall_clock.c"), include_str!("wall_clock.c"))
            .and_then(|()| std::fs::write(folder.join("wall_clock.offset"), 0_i64.to_ne_bytes()))
            .expect("the temporary folder can be written");
        let compiler = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-fno-builtin", "-o", "wall_clock.so", "wall_clock.c"])
            .current_dir(folder)
            .output();
        let compiler =
            compiler.unwrap_or_else(|error| panic!("cc: {error}: apt-get install -y gcc libc6-dev"));
        assert!(compiler.status.success(), "cc: {}", String::from_utf8_lossy(&compiler.stderr));
        Self { folder: folder.to_owned() }
    }

    /// Lets a program that is to be started go by it.
    pub fn give_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", self.folder.join("wall_clock.so"));
        command.env("WALL_CLOCK_OFFSET", self.folder.join("wall_clock.offset"));
    }

    /// Moves it by so many microseconds from the true time, at once.
    ///
    /// # Panics
    /// If its folder is gone.
    pub fn set_offset(&self, microseconds: i64) {
        // In place and in one write: its users have the file mapped.
        let file = OpenOptions::new().write(true).open(self.folder.join("wall_clock.offset"));
        file.and_then(|mut file| file.write_all(&microseconds.to_ne_bytes())).expect("the clock can be set");
    }
}
