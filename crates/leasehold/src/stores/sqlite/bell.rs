//! The bell: a pipe with a name beside a store's lifeline, by which other processes tell it that a claim of its own was
//! handed a lock. It hangs only while somebody waits through this store.
//!
//! What it says is a hint: who hears it looks into the database. A ring that got lost is made good for by the rounds.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::files;
use crate::types::ClaimId;

/// A ring is the id of the claim. So short a write into a pipe is done in one piece or not at all.
const RING: usize = 16;

/// Our own bell, with the thread that listens. Dropped, it is taken down.
#[derive(Debug)]
pub(super) struct Bell {
    path: PathBuf,
    pipe: Arc<File>,
    down: Arc<AtomicBool>,
}

impl Bell {
    /// Hangs it at `path`; `rung` is told the claims it was rung for, from a thread of its own.
    pub(super) fn hang(
        path: PathBuf,
        database: &Metadata,
        rung: impl Fn(Vec<ClaimId>) + Send + 'static,
    ) -> io::Result<Self> {
        let pipe = Arc::new(files::create_pipe(&path, database)?);
        let bell = Self { path, pipe: pipe.clone(), down: Arc::default() };
        let down = bell.down.clone();
        let listen = move || {
            let mut read = [0; 256 * RING];
            loop {
                match (&*pipe).read(&mut read) {
                    _ if down.load(Ordering::Acquire) => return,
                    Ok(length) => rung(read[..length].as_chunks().0.iter().map(claim_of).collect()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        tracing::debug!(%error, "the bell cannot be heard: waiters look from time to time");
                        return;
                    }
                }
            }
        };
        std::thread::Builder::new().name("leasehold-bell".into()).spawn(listen)?;
        Ok(bell)
    }

    /// Whether it hangs where others look for it.
    pub(super) fn in_place(&self) -> bool {
        let number = |found: io::Result<Metadata>| found.map(|found| (found.dev(), found.ino())).ok();
        number(fs::symlink_metadata(&self.path))
            .is_some_and(|hung| Some(hung) == number(self.pipe.metadata()))
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.down.store(true, Ordering::Release);
        // Cannot wait for long: the listener empties the pipe.
        let _ = (&*self.pipe).write(&[0; RING]);
        let _ = fs::remove_file(&self.path);
    }
}

fn claim_of(ring: &[u8; RING]) -> ClaimId {
    ClaimId::from_bytes(*ring)
}

/// Rings the bell at `path`. Never waits: a pipe that is full has rings enough in it.
///
/// # Errors
/// What the system says; the waiter finds out by itself then, a little later.
pub(super) fn ring(path: &Path, claim: ClaimId) -> io::Result<()> {
    match files::open_pipe(path)?.write(claim.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        written => written.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_bell_tells_who_it_was_rung_for_and_can_be_taken_down() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bell");
        let found = fs::metadata(folder.path()).unwrap();
        let (sender, rings) = channel();
        let bell = Bell::hang(path.clone(), &found, move |claims| sender.send(claims).unwrap()).unwrap();
        assert!(bell.in_place());
        let claims = [[1; 16], [2; 16]].map(ClaimId::from_bytes);
        let mut heard = Vec::new();
        for claim in claims {
            ring(&path, claim).unwrap();
        }
        while heard.len() < 2 {
            heard.extend(rings.recv().unwrap());
        }
        assert_eq!(heard, claims);
        fs::remove_file(&path).unwrap();
        files::create_pipe(&path, &found).unwrap();
        assert!(!bell.in_place(), "another hangs there");
        drop(bell);
        assert!(rings.recv().is_err(), "the thread has ended");
        assert!(!path.exists() && ring(&path, claims[0]).is_err());
    }

    #[test]
    fn a_full_pipe_and_one_that_nobody_reads_hold_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bell");
        let found = fs::metadata(folder.path()).unwrap();
        let claim = ClaimId::from_bytes([7; 16]);
        let unread = files::create_pipe(&path, &found).unwrap();
        for _ in 0..10_000 {
            ring(&path, claim).unwrap();
        }
        drop(unread);
        ring(&path, claim).unwrap();
    }

    #[test]
    fn what_is_no_pipe_is_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "kept").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            assert!(ring(path, ClaimId::from_bytes([7; 16])).is_err());
        }
        assert_eq!(fs::read(&file).unwrap(), b"kept");
    }
}
