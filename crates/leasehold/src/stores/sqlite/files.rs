//! The files on disk: where the database lies, whether it may lie there, and whether it is still the one that was opened.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Readable and writable by its owner only: whoever can write these files can take every lock.
const PRIVATE_FILE: u32 = 0o600;
const PRIVATE_FOLDER: u32 = 0o700;

/// No SQLite database that holds anything has fewer bytes.
const SMALLEST_DATABASE: u64 = 512;

/// File systems on which another machine can write the same file: kernel locks and shared memory do not reach it.
const NETWORK_FILE_SYSTEMS: &[(u32, &str)] = &[
    (0x6969, "nfs"),
    (0x517b, "smb"),
    (0xff53_4d42, "cifs"),
    (0xfe53_4d42, "smb2"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "fuse or virtiofs"),
    (0x00c3_6400, "ceph"),
    (0x5346_414f, "afs"),
    (0x6b41_4653, "kafs"),
    (0x7375_7245, "coda"),
    (0x564c, "ncp"),
    (0x0bd0_0bd0, "lustre"),
    (0x0116_1970, "gfs2"),
    (0x7461_636f, "ocfs2"),
    (0x4750_4653, "gpfs"),
    (0x1983_0326, "beegfs"),
    (0x2003_0528, "orangefs"),
    (0xaad7_aaea, "panfs"),
    (0x786f_4256, "vboxsf"),
    (0xbacb_acbc, "vmhgfs"),
    (0x7c7c_6673, "prl_fs"),
];

/// The file systems that people meet, by the number that `statfs` gives, for showing.
const LOCAL_FILE_SYSTEMS: &[(u32, &str)] = &[
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x794c_7630, "overlayfs"),
    (0x2fc1_2fc1, "zfs"),
    (0xf2f5_2010, "f2fs"),
    (0xca45_1a4e, "bcachefs"),
    (0x8584_58f6, "ramfs"),
    (0x4d44, "vfat"),
    (0x2011_bab0, "exfat"),
];

fn named(table: &[(u32, &'static str)], magic: u32) -> Option<&'static str> {
    table.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name)
}

/// The name of the network file system with this magic number of `statfs`; `None` for one that is local.
pub(super) fn network_file_system(magic: u32) -> Option<&'static str> {
    named(NETWORK_FILE_SYSTEMS, magic)
}

/// A name for the file system with this magic number, for people.
pub(super) fn file_system_name(magic: u32) -> String {
    network_file_system(magic)
        .or_else(|| named(LOCAL_FILE_SYSTEMS, magic))
        .map_or_else(|| format!("number {magic:#x}"), ToOwned::to_owned)
}

/// The magic number of the file system that `path` lies on.
pub(super) fn file_system_magic(path: &Path) -> io::Result<u32> {
    let found = rustix::fs::statfs(path)?;
    // The field is signed or not and 32 or 64 bits wide, by architecture; the number is its low 32 bits.
    Ok(u32::try_from(i128::from(found.f_type) & 0xffff_ffff).unwrap_or_default())
}

/// Bytes that an ordinary user may still write to the file system of `path`.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// `path` with something put after its last character.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut longer = OsString::from(path);
    longer.push(suffix);
    longer.into()
}

fn refused(what: &str, path: &Path) -> Error {
    Error::new(ErrorKind::Rejected, format!("{what}: {}", path.display()))
}

fn unusable(path: &Path, source: io::Error) -> Error {
    let advice = match source.kind() {
        io::ErrorKind::PermissionDenied => "give yourself rights to it, or give another path",
        io::ErrorKind::ReadOnlyFilesystem => "give a path on a file system that can be written",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space, or give another path",
        io::ErrorKind::NotFound => "the path does not exist and was not to be created",
        _ => "give another path",
    };
    refused("the lock database cannot be used", path).caused_by(source).advise(advice)
}

/// Finds the one true path of the database, making its folder if need be, and refuses what can be no database of ours.
///
/// Every name of one file must lead to one path, since the files beside it are found by that path.
pub(super) fn resolve(path: &Path, create: bool) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Error::invalid("the path of the lock database is empty"));
    }
    let path = std::path::absolute(path).map_err(|e| unusable(path, e))?;
    refuse_network(&path)?;
    match fs::metadata(&path) {
        Ok(found) => {
            refuse_non_files(&path, &found)?;
            fs::canonicalize(&path).map_err(|e| unusable(&path, e)).and_then(refuse_mounted_alone)
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound || !create => Err(unusable(&path, e)),
        Err(_) if fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) => {
            Err(refused("the lock database is a symbolic link that leads nowhere", &path)
                .advise("mend or remove the link"))
        }
        Err(_) => create_database(&path),
    }
}

fn refuse_non_files(path: &Path, found: &Metadata) -> Result<()> {
    if found.is_dir() {
        return Err(refused("the lock database is a folder", path).advise("give the path of a file in it"));
    }
    if !found.is_file() {
        return Err(refused("the lock database is no regular file", path).advise("give another path"));
    }
    if (1..SMALLEST_DATABASE).contains(&found.len()) {
        // SQLite would take it for an empty database and write over it.
        return Err(refused("the file is not a database", path)
            .advise("it was left as it is: give the path of a file of Leasehold's own"));
    }
    if found.nlink() > 1 {
        // The write-ahead log is found by the name: two names would be two databases in one file.
        return Err(refused("the lock database has several names (hard links)", path)
            .advise("remove all but one of them"));
    }
    Ok(())
}

/// Refuses a file that is mounted by itself, as by `docker run -v /srv/locks.db:/locks.db`: its log and its gate would
/// be others here than there, and each lock would have two holders.
fn refuse_mounted_alone(path: PathBuf) -> Result<PathBuf> {
    // Where no such list is, there are no such mounts.
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    if mount_points(&mounts).any(|point| point == path.as_os_str().as_bytes()) {
        return Err(refused("the lock database is mounted here by itself, without its folder", &path)
            .advise("mount its folder: the files beside it must be the same for everybody"));
    }
    Ok(path)
}

/// The fifth word of each line, where blanks and the like stand as octal numbers: `\040`.
fn mount_points(mounts: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    mounts.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut rest = line.split(|byte| *byte == b' ').nth(4)?;
        let mut point = Vec::with_capacity(rest.len());
        while let [first, tail @ ..] = rest {
            let escaped = tail
                .get(..3)
                .filter(|_| *first == b'\\')
                .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
            point.push(escaped.unwrap_or(*first));
            rest = if escaped.is_some() { &tail[3..] } else { tail };
        }
        Some(point)
    })
}

fn refuse_network(path: &Path) -> Result<()> {
    let existing = path.ancestors().find(|ancestor| fs::metadata(ancestor).is_ok()).unwrap_or(Path::new("/"));
    let magic = file_system_magic(existing).map_err(|e| unusable(existing, e))?;
    match network_file_system(magic) {
        None => Ok(()),
        Some(name) => Err(refused(
            &format!("the lock database would lie on a network file system ({name})"),
            path,
        )
        .advise(
            "kernel locks and shared memory do not work across machines: use a local path, or a lock server \
                 (redis://...) for locks across machines",
        )),
    }
}

fn create_database(path: &Path) -> Result<PathBuf> {
    let (Some(folder), Some(file)) = (path.parent(), path.file_name()) else {
        return Err(refused("the lock database has no file name", path).advise("give the path of a file"));
    };
    DirBuilder::new().recursive(true).mode(PRIVATE_FOLDER).create(folder).map_err(|e| unusable(folder, e))?;
    let path = fs::canonicalize(folder).map_err(|e| unusable(folder, e))?.join(file);
    // Opened here only if it is new: closing a file that SQLite has open elsewhere in this process would drop
    // SQLite's own locks on it.
    match OpenOptions::new().write(true).create_new(true).mode(PRIVATE_FILE).open(&path) {
        Ok(_) => Ok(path),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(path),
        Err(e) => Err(unusable(&path, e)),
    }
}

/// Opens, or makes, a private file beside the database, belonging to whom the database belongs.
pub(super) fn open_private(path: &Path, database: &Metadata) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(PRIVATE_FILE)
        .custom_flags(no_link())
        .open(path)
        .map_err(|e| unusable(path, e))?;
    hand_over(&file, database);
    Ok(file)
}

/// Makes a private file that must be new.
pub(super) fn create_private(path: &Path, database: &Metadata) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(PRIVATE_FILE)
        .custom_flags(no_link())
        .open(path)
        .map_err(|e| unusable(path, e))?;
    hand_over(&file, database);
    Ok(file)
}

/// Makes a private pipe with a name, which must be new, and opens it.
///
/// For reading and writing: so a reader never sees its end, and a writer whose reader is gone gets no signal.
pub(super) fn create_pipe(path: &Path, database: &Metadata) -> io::Result<File> {
    rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::from_raw_mode(PRIVATE_FILE))?;
    let pipe = OpenOptions::new().read(true).write(true).custom_flags(no_link()).open(path)?;
    hand_over(&pipe, database);
    Ok(pipe)
}

/// Opens a pipe that another process made, to write into it without ever waiting.
pub(super) fn open_pipe(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW;
    let flags = flags.bits().cast_signed();
    let pipe = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    if !pipe.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no pipe"));
    }
    Ok(pipe)
}

/// Makes a private folder, unless it is there.
pub(super) fn private_folder(path: &Path, database: &Metadata) -> Result<()> {
    match DirBuilder::new().mode(PRIVATE_FOLDER).create(path) {
        Ok(()) => {
            let made = OpenOptions::new().read(true).custom_flags(no_link()).open(path);
            hand_over(&made.map_err(|e| unusable(path, e))?, database);
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && is_folder(path) => {}
        Err(e) => return Err(unusable(path, e)),
    }
    Ok(())
}

/// The flag of `open` that refuses a symbolic link: its owner could make root open, and hand over, any file.
fn no_link() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

/// Whether a folder is there, and no link to one.
fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
}

/// Root working on a user's database must not leave files that the user cannot open, nor give away others: so it goes by
/// the open file and not by its path, and a file with another name besides is left alone.
fn hand_over(file: &File, database: &Metadata) {
    let is_ours_alone = |found: &Metadata| found.is_dir() || found.nlink() == 1;
    if file.metadata().is_ok_and(|found| found.uid() != database.uid() && is_ours_alone(&found)) {
        // Only root can; for anybody else the file is their own anyway.
        let _ = fchown(file, Some(database.uid()), Some(database.gid()));
    }
}

/// Which file a path led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    fn of(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|found| Self { device: found.dev(), number: found.ino() })
    }
}

/// The files of the open database, to notice when somebody deletes or replaces them under us.
///
/// SQLite would go on with files that nobody else can reach any more: a second database, without a word.
#[derive(Debug)]
pub(super) struct Identity(Vec<(PathBuf, Option<Inode>)>);

impl Identity {
    /// Notes the files of the database at `path`, which is open.
    pub(super) fn note(path: &Path) -> Self {
        let files = [path.to_owned(), beside(path, "-wal"), beside(path, "-shm")];
        Self(
            files
                .into_iter()
                .map(|file| (Inode::of(&file), file))
                .map(|(inode, file)| (file, inode))
                .collect(),
        )
    }

    /// Fails if a path leads to another file now, or to none.
    pub(super) fn verify(&self) -> Result<()> {
        for (path, noted) in &self.0 {
            let found = Inode::of(path);
            if found.is_none() || found != *noted {
                let how = if found.is_some() { "replaced" } else { "deleted" };
                return Err(refused(
                    &format!("a file of the lock database was {how} while it was open"),
                    path,
                )
                .advise("locks held in it protect nothing any more: restart the programs that use it"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_known_by_their_numbers() {
        for (magic, name) in [
            (0x6969, "nfs"),
            (0x517b, "smb"),
            (0xff53_4d42, "cifs"),
            (0xfe53_4d42, "smb2"),
            (0x0102_1997, "9p"),
            (0x6573_5546, "fuse or virtiofs"),
            (0x00c3_6400, "ceph"),
            (0x5346_414f, "afs"),
            (0x0bd0_0bd0, "lustre"),
            (0x0116_1970, "gfs2"),
            (0x7461_636f, "ocfs2"),
        ] {
            assert_eq!(network_file_system(magic), Some(name));
        }
        for (magic, name) in LOCAL_FILE_SYSTEMS {
            assert_eq!(network_file_system(*magic), None, "{name}");
            assert_eq!(file_system_name(*magic), *name);
        }
        assert_eq!(file_system_name(0x1234_5678), "number 0x12345678");
    }

    #[test]
    fn mount_points_are_read() {
        let mounts = b"36 35 98:0 /mnt1 /mnt\\0402\\134 rw - ext3 /dev/root rw\n37 35 0:1 / /x rw\nshort\n";
        assert_eq!(mount_points(mounts).collect::<Vec<_>>(), [b"/mnt 2\\".to_vec(), b"/x".to_vec()]);
    }

    #[test]
    fn the_number_of_a_real_file_system_is_read() {
        assert_eq!(file_system_magic(Path::new("/proc")).unwrap(), 0x9fa0);
    }

    #[test]
    fn a_deleted_and_a_replaced_file_are_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        for suffix in ["", "-wal", "-shm"] {
            fs::write(beside(&path, suffix), "x").unwrap();
        }
        let identity = Identity::note(&path);
        identity.verify().unwrap();
        for suffix in ["", "-wal", "-shm"] {
            let (file, aside) = (beside(&path, suffix), folder.path().join("aside"));
            fs::rename(&file, &aside).unwrap();
            assert!(identity.verify().unwrap_err().to_string().contains("deleted"), "{suffix}");
            fs::copy(&aside, &file).unwrap();
            assert!(identity.verify().unwrap_err().to_string().contains("replaced"), "{suffix}");
            fs::rename(&aside, &file).unwrap();
            identity.verify().unwrap();
        }
    }
}
