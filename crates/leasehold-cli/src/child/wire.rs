//! What the processes of one `leasehold run` say to each other, over a socket pair that keeps message boundaries.
//!
//! The socket is the standard input of the process started with it: that is the one inherited descriptor which safe
//! code can take up. The real standard input travels over it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use leasehold::clock::Instant;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

/// What the guardian found once the whole family was gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    /// How the command itself ended.
    pub(crate) ended: Ended,
    /// Whether the guardian stopped it before it ended by itself.
    pub(crate) cut_short: bool,
    /// How many processes the command left behind that had to be stopped.
    pub(crate) leftovers: u32,
    /// When the last one was reaped.
    pub(crate) reaped_at: Instant,
}

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Runner to guardian: the lock can be trusted until then.
    Deadline(Instant),
    /// Runner to guardian: the lock is lost, stop the command now.
    Stop,
    /// To guardian or runner: pass this signal on; whether the terminal sent it, and so to the command as well.
    Signal(i32, bool),
    /// Guardian to runner: the command runs, with this pid.
    Started(u32),
    /// Guardian to runner: it could not be started, for this reason of the operating system.
    Failed(i32),
    /// Guardian to runner: all is over.
    Done(Report),
}

const WORDS: usize = 5;

impl Message {
    fn encode(self) -> [u8; WORDS * 8] {
        let words: [u64; WORDS] = match self {
            Self::Deadline(at) => [1, nanos(at), 0, 0, 0],
            Self::Stop => [2, 0, 0, 0, 0],
            Self::Signal(number, terminal) => {
                [3, u64::from(number.unsigned_abs()), u64::from(terminal), 0, 0]
            }
            Self::Started(pid) => [4, u64::from(pid), 0, 0, 0],
            Self::Failed(errno) => [5, u64::from(errno.unsigned_abs()), 0, 0, 0],
            Self::Done(report) => {
                let ended = match report.ended {
                    Ended::Code(code) => u64::from(code),
                    Ended::Signal(number) => 256 + u64::from(number),
                };
                let (cut, left) = (u64::from(report.cut_short), u64::from(report.leftovers));
                [6, ended, cut, left, nanos(report.reaped_at)]
            }
        };
        let mut bytes = [0; WORDS * 8];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = [0; WORDS];
        if bytes.len() != WORDS * 8 {
            return None;
        }
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        let [kind, a, b, c, d] = words;
        Some(match kind {
            1 => Self::Deadline(instant(a)),
            2 => Self::Stop,
            3 => Self::Signal(i32::try_from(a).ok()?, b != 0),
            4 => Self::Started(u32::try_from(a).ok()?),
            5 => Self::Failed(i32::try_from(a).ok()?),
            6 => Self::Done(Report {
                ended: u8::try_from(a).map_or(Ended::Signal(u8::try_from(a & 0xff).ok()?), Ended::Code),
                cut_short: b != 0,
                leftovers: u32::try_from(c).ok()?,
                reaped_at: instant(d),
            }),
            _ => return None,
        })
    }
}

/// A moment as nanoseconds of the boot-time clock, which all processes of the machine share.
pub(crate) fn nanos(at: Instant) -> u64 {
    u64::try_from(at.after_boot().as_nanos()).unwrap_or(u64::MAX)
}

/// The moment that [`nanos`] gave.
pub(crate) fn instant(nanos: u64) -> Instant {
    Instant::since_boot(Duration::from_nanos(nanos))
}

/// What came of a look at the socket.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// A message.
    Message(Message),
    /// Nothing for now.
    Nothing,
    /// The other side is gone.
    Gone,
}

/// Both ends of a new connection; neither is inherited by accident.
pub(crate) fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends without waiting. A full buffer or a dead reader loses the message: every message is repeated by what follows
/// it (a later deadline, the end of file), and the reader who misses it only stops the command earlier.
pub(crate) fn tell(socket: impl AsFd, message: Message) {
    let _ = send(socket, &message.encode(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

/// Takes the next message without waiting.
pub(crate) fn hear(socket: impl AsFd) -> Heard {
    let mut bytes = [0_u8; WORDS * 8];
    loop {
        return match recv(&socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Heard::Gone,
            Ok((length, _)) => match Message::decode(&bytes[..length]) {
                Some(message) => Heard::Message(message),
                None => continue,
            },
            // The kernel tells first that the other side went without having heard everything, and then its last words.
            Err(Errno::INTR | Errno::CONNRESET) => continue,
            Err(Errno::AGAIN) => Heard::Nothing,
            Err(_) => Heard::Gone,
        };
    }
}

/// An end of a connection, for tasks that wait for other things too.
#[derive(Debug)]
pub(crate) struct Line(UnixDatagram);

impl Line {
    /// Takes an end of a [`pair`].
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        // To the library it is a socket that keeps message boundaries; that this one also has an end it need not know.
        let socket = std::os::unix::net::UnixDatagram::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self(UnixDatagram::from_std(socket)?))
    }

    /// As [`tell`].
    pub(crate) fn tell(&self, message: Message) {
        tell(&self.0, message);
    }

    /// The next message; `None` once the other side is gone.
    pub(crate) fn poll(&self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        // The socket itself is asked before the runtime is: after a pause the runtime does not know yet what has come.
        let mut heard = hear(&self.0);
        loop {
            match heard {
                Heard::Message(message) => return Poll::Ready(Some(message)),
                Heard::Gone => return Poll::Ready(None),
                Heard::Nothing => ready!(self.0.poll_recv_ready(context)).ok(),
            };
            let nothing = || io::Error::from(io::ErrorKind::WouldBlock);
            let again = || Some(hear(&self.0)).filter(|heard| *heard != Heard::Nothing).ok_or_else(nothing);
            heard = self.0.try_io(Interest::READABLE, again).unwrap_or(Heard::Nothing);
        }
    }
}

/// Sends open files to the other side.
pub(crate) fn hand_over(socket: impl AsFd, files: &[&OwnedFd]) -> rustix::io::Result<()> {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    sendmsg(socket, &[IoSlice::new(b"f")], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// Waits for the files that the other side hands over first of all.
pub(crate) fn take_over(socket: impl AsFd) -> rustix::io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut [0; 1])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    Ok(files.flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_read_as_it_was_written() {
        let at = instant(1_234_567_890_123);
        let report = |ended| Report { ended, cut_short: true, leftovers: 7, reaped_at: at };
        for message in [
            Message::Deadline(at),
            Message::Stop,
            Message::Signal(15, true),
            Message::Started(4_000_000),
            Message::Failed(2),
            Message::Done(report(Ended::Code(255))),
            Message::Done(report(Ended::Signal(9))),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode(b"short"), None);
        assert_eq!(Message::decode(&[9; WORDS * 8]), None);
    }

    #[test]
    fn a_closed_socket_is_told_from_a_silent_one() {
        let (here, there) = pair().unwrap();
        assert_eq!(hear(&here), Heard::Nothing);
        tell(&there, Message::Stop);
        assert_eq!(hear(&here), Heard::Message(Message::Stop));
        drop(there);
        assert_eq!(hear(&here), Heard::Gone);
    }

    #[test]
    fn the_last_word_is_heard_also_of_one_who_did_not_hear_ours() {
        let (here, there) = pair().unwrap();
        tell(&here, Message::Stop);
        tell(&there, Message::Failed(2));
        drop(there);
        assert_eq!(hear(&here), Heard::Message(Message::Failed(2)));
        assert_eq!(hear(&here), Heard::Gone);
    }

    #[test]
    fn files_travel() {
        let (here, there) = pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        hand_over(&here, &[&writer]).unwrap();
        let files = take_over(&there).unwrap();
        rustix::io::write(&files[0], b"x").unwrap();
        assert_eq!(rustix::io::read(&reader, &mut [0_u8; 4]).unwrap(), 1);
    }
}
