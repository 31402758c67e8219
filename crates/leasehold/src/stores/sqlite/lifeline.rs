//! Who lives: one small file per open store, whose kernel lock is free exactly when its whole family is dead.
//!
//! The lock belongs to the open file, so every child that inherited the descriptor keeps it, and the kernel drops it
//! when the last of them is gone, however it went. Process ids would not do: containers share folders but not pids.

use std::fs::{self, File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files;
use crate::clock;
use crate::error::{Error, ErrorKind, Result};

/// How many dead processes are cleared away together: cleaning up is shared work, done in small steps.
const SWEEP_STEP: usize = 8;

/// What the name of a bell has more than that of the file beside it.
const BELL: &str = ".bell";

/// The name of a lifeline: 16 random bytes, then the inode number of its file.
///
/// With the number a copy of the file (a restored backup), which nobody locks, is not taken for a dead process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LifelineId([u8; 24]);

impl LifelineId {
    fn new(random: [u8; 16], inode: u64) -> Self {
        let mut id = [0; 24];
        id[..16].copy_from_slice(&random);
        id[16..].copy_from_slice(&inode.to_be_bytes());
        Self(id)
    }

    /// The bytes as rows keep them.
    pub(super) fn as_bytes(&self) -> &[u8; 24] {
        &self.0
    }

    /// Reads what rows keep; `None` for anything else.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    fn inode(&self) -> u64 {
        self.0[16..].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn file_name(&self) -> String {
        self.0[..16].iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }
}

/// What is known of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// It and all its family are dead.
    Dead,
    /// It or one of its family lives, on this very kernel.
    Alive,
    /// Nothing.
    Unknown,
}

/// The folder of lifelines beside a database, and our own among them.
#[derive(Debug)]
pub(super) struct Lifelines {
    folder: PathBuf,
    id: LifelineId,
    own: Arc<File>,
}

impl Lifelines {
    /// Makes our own lifeline beside the database. Call it with the gate held: a file that is there but not yet locked
    /// would look dead to one who sweeps.
    pub(super) fn create(database: &Path, found: &Metadata) -> Result<Self> {
        let folder = files::beside(database, "-live");
        files::private_folder(&folder, found)?;
        let random = *clock::claim_id().as_bytes();
        let path = folder.join(LifelineId::new(random, 0).file_name());
        let own = files::create_private(&path, found)?;
        let inode =
            own.metadata().and_then(|own_file| own.try_lock().map(|()| own_file.ino()).map_err(Into::into));
        let inode = inode.map_err(|e| {
            Error::new(ErrorKind::Rejected, format!("a kernel lock cannot be taken on {}", path.display()))
                .caused_by(e)
                .advise("the file system does not know flock: give another path")
        })?;
        Ok(Self { folder, id: LifelineId::new(random, inode), own: Arc::new(own) })
    }

    /// Our own.
    pub(super) fn id(&self) -> LifelineId {
        self.id
    }

    /// The file that carries our lock.
    pub(super) fn file(&self) -> Arc<File> {
        self.own.clone()
    }

    /// Whether our own file is where others look for it.
    pub(super) fn in_place(&self) -> bool {
        fs::metadata(self.path(self.id)).is_ok_and(|found| found.ino() == self.id.inode())
    }

    fn path(&self, id: LifelineId) -> PathBuf {
        self.folder.join(id.file_name())
    }

    /// Where the bell of a process hangs, while it has one.
    pub(super) fn bell(&self, id: LifelineId) -> PathBuf {
        files::beside(&self.path(id), BELL)
    }

    /// What its file says of a process. One that is missing, another's or out of reach says nothing.
    pub(super) fn life(&self, id: LifelineId) -> Life {
        if id == self.id {
            return Life::Alive;
        }
        match File::open(self.path(id)) {
            Ok(file) if file.metadata().is_ok_and(|found| found.ino() == id.inode()) => look(&file),
            _ => Life::Unknown,
        }
    }

    /// Whether the process and all its family are dead for certain.
    pub(super) fn is_dead(&self, id: LifelineId) -> bool {
        self.life(id) == Life::Dead
    }

    /// Removes the file of a process that is dead and of whose holds no row is left.
    pub(super) fn bury(&self, id: LifelineId) {
        // If it fails, a later opening sweeps it up: the bell goes first, as it is found by the file.
        let _ = fs::remove_file(self.bell(id));
        let _ = fs::remove_file(self.path(id));
    }

    /// Files of the dead, a few of them. Call it with the gate held, so that none is seen between its making and its
    /// locking.
    pub(super) fn dead(&self) -> Vec<LifelineId> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        let known = |entry: fs::DirEntry| {
            let random = parse_file_name(&entry.file_name().to_string_lossy())?;
            Some(LifelineId::new(random, entry.metadata().ok()?.ino()))
        };
        entries.flatten().filter_map(known).filter(|id| self.is_dead(*id)).take(SWEEP_STEP).collect()
    }
}

/// Whether somebody holds the lock of this file. The look itself takes a shared lock, for as long as `file` is open.
fn look(file: &File) -> Life {
    match file.try_lock_shared() {
        Ok(()) => Life::Dead,
        Err(TryLockError::WouldBlock) => Life::Alive,
        Err(TryLockError::Error(_)) => Life::Unknown,
    }
}

fn parse_file_name(name: &str) -> Option<[u8; 16]> {
    let is_ours = name.len() == 32 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    is_ours.then(|| u128::from_str_radix(name, 16).ok().map(u128::to_be_bytes)).flatten()
}

/// How many stores have a file beside `database`, for an operator's look.
pub(super) fn count(database: &Path) -> io::Result<usize> {
    let is_bell = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().ends_with(BELL.as_bytes());
    fs::read_dir(files::beside(database, "-live"))
        .map(|entries| entries.flatten().filter(|entry| !is_bell(entry)).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (tempfile::TempDir, Lifelines, Lifelines) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        fs::write(&path, "").unwrap();
        let found = fs::metadata(&path).unwrap();
        let (a, b) = (Lifelines::create(&path, &found).unwrap(), Lifelines::create(&path, &found).unwrap());
        (folder, a, b)
    }

    #[test]
    fn a_lifeline_is_dead_when_its_file_is_closed_and_not_before() {
        let (_folder, a, b) = pair();
        let (a_id, inherited) = (a.id(), a.file().try_clone().unwrap());
        assert!(!b.is_dead(a_id) && !a.is_dead(a_id));
        drop(a);
        assert!(!b.is_dead(a_id), "a child's copy keeps it alive");
        drop(inherited);
        assert!(b.is_dead(a_id));
        assert_eq!(LifelineId::from_bytes(a_id.as_bytes()), Some(a_id));
    }

    #[test]
    fn a_missing_or_copied_file_proves_nothing() {
        let (_folder, a, b) = pair();
        let path = b.path(a.id());
        let aside = path.with_extension("aside");
        fs::rename(&path, &aside).unwrap();
        assert!(!b.is_dead(a.id()) && !a.in_place());
        fs::copy(&aside, &path).unwrap();
        assert!(!b.is_dead(a.id()) && !a.in_place());
        fs::rename(&aside, &path).unwrap();
        assert!(a.in_place());
        let a_id = a.id();
        drop(a);
        assert!(b.is_dead(a_id));
    }

    #[test]
    fn the_dead_are_found_among_the_living() {
        let (folder, a, b) = pair();
        fs::write(folder.path().join("db-live/stranger"), "").unwrap();
        assert_eq!(b.dead(), [], "the living are not");
        assert_eq!(count(&folder.path().join("db")).unwrap(), 3);
        let a_id = a.id();
        drop(a);
        assert_eq!(b.dead(), [a_id]);
        b.bury(a_id);
        assert!(!b.path(a_id).exists() && b.in_place() && !b.is_dead(a_id));
    }
}
