//! The Redis protocol, as far as tests need it: framing in both directions, and a client of a few lines.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// A reply of a server.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// `+OK` and its like.
    Simple(String),
    /// An error, with its code.
    Error(String),
    /// A number.
    Int(i64),
    /// Bytes, or null.
    Bulk(Option<Vec<u8>>),
    /// A list, or null; maps and sets of RESP3 come as lists too.
    Array(Option<Vec<Reply>>),
}

impl fmt::Display for Reply {
    /// As `redis-cli` prints into a pipe: one item a line, null as nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Simple(text) | Self::Error(text) => f.write_str(text),
            Self::Int(number) => write!(f, "{number}"),
            Self::Bulk(None) | Self::Array(None) => Ok(()),
            Self::Bulk(Some(bytes)) => f.write_str(&String::from_utf8_lossy(bytes)),
            Self::Array(Some(items)) => {
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        f.write_str("\n")?;
                    }
                    item.fmt(f)?;
                }
                Ok(())
            }
        }
    }
}

/// The bytes of a command.
pub fn encode<A: AsRef<[u8]>>(args: &[A]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", args.len()).into_bytes();
    for arg in args {
        let arg = arg.as_ref();
        out.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        out.extend_from_slice(arg);
        out.extend_from_slice(b"\r\n");
    }
    out
}

/// The line that begins at `from` without its end, and where the next begins; `None` if it is not whole yet.
fn line(bytes: &[u8], from: usize) -> Option<(&[u8], usize)> {
    let rest = bytes.get(from..)?;
    let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
    Some((&rest[..end], from + end + 2))
}

fn number(digits: &[u8]) -> i64 {
    std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).unwrap_or(-1)
}

/// The first command in `bytes` and its length; `None` if it is not whole yet. Inline commands are one line.
pub fn parse_command(bytes: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let (first, mut at) = line(bytes, 0)?;
    if first.first() != Some(&b'*') {
        let words = first.split(|byte| *byte == b' ').filter(|word| !word.is_empty()).map(<[u8]>::to_vec);
        return Some((words.collect(), at));
    }
    let count = usize::try_from(number(&first[1..])).unwrap_or(0);
    let mut args = Vec::with_capacity(count.min(1024));
    for _ in 0..count {
        let (header, start) = line(bytes, at)?;
        let length = usize::try_from(number(header.get(1..)?)).unwrap_or(0);
        if bytes.len() < start + length + 2 {
            return None;
        }
        args.push(bytes[start..start + length].to_vec());
        at = start + length + 2;
    }
    Some((args, at))
}

/// The first reply in `bytes` and its length; `None` if it is not whole yet.
pub fn parse_reply(bytes: &[u8]) -> Option<(Reply, usize)> {
    let (first, at) = line(bytes, 0)?;
    let (kind, rest) = first.split_first()?;
    let text = || String::from_utf8_lossy(rest).into_owned();
    let counted = |per_item: i64| usize::try_from(number(rest).saturating_mul(per_item)).ok();
    match kind {
        b'+' | b',' | b'(' | b'#' => Some((Reply::Simple(text()), at)),
        b'-' => Some((Reply::Error(text()), at)),
        b':' => Some((Reply::Int(number(rest)), at)),
        b'_' => Some((Reply::Bulk(None), at)),
        b'$' | b'=' | b'!' => match counted(1) {
            None => Some((Reply::Bulk(None), at)),
            Some(length) if bytes.len() >= at + length + 2 => {
                Some((Reply::Bulk(Some(bytes[at..at + length].to_vec())), at + length + 2))
            }
            Some(_) => None,
        },
        b'*' | b'~' | b'>' | b'%' | b'|' => match counted(if matches!(kind, b'%' | b'|') { 2 } else { 1 }) {
            None => Some((Reply::Array(None), at)),
            Some(count) => {
                let (mut items, mut at) = (Vec::new(), at);
                for _ in 0..count {
                    let (item, length) = parse_reply(&bytes[at..])?;
                    items.push(item);
                    at += length;
                }
                Some((Reply::Array(Some(items)), at))
            }
        },
        _ => Some((Reply::Error(format!("not a reply: {}", String::from_utf8_lossy(first))), at)),
    }
}

/// A connection for tests: one command at a time, no more.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects; every later read and write ends after [`PATIENCE`](crate::PATIENCE).
    pub fn connect(address: impl ToSocketAddrs) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(crate::PATIENCE))?;
        stream.set_write_timeout(Some(crate::PATIENCE))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Sends a command without waiting for its reply.
    pub fn send<A: AsRef<[u8]>>(&mut self, args: &[A]) -> io::Result<()> {
        self.stream.write_all(&encode(args))
    }

    /// Takes the next reply, waiting for at most this long.
    pub fn receive_within(&mut self, patience: Duration) -> io::Result<Reply> {
        self.stream.set_read_timeout(Some(patience))?;
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some((reply, length)) = parse_reply(&self.buffer) {
                self.buffer.drain(..length);
                return Ok(reply);
            }
            match self.stream.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.buffer.extend_from_slice(&chunk[..read]),
            }
        }
    }

    /// Sends a command and takes its reply.
    pub fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> io::Result<Reply> {
        self.send(args)?;
        self.receive_within(crate::PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_whole_or_not_there() {
        let bytes = encode(&["SET", "a\r\nb", ""]);
        for cut in 0..bytes.len() {
            assert_eq!(parse_command(&bytes[..cut]), None, "cut at {cut}");
        }
        let two = [bytes.clone(), b"PING\r\n".to_vec()].concat();
        let (args, length) = parse_command(&two).unwrap();
        assert_eq!(args, [b"SET".to_vec(), b"a\r\nb".to_vec(), Vec::new()]);
        assert_eq!(length, bytes.len());
        assert_eq!(parse_command(&two[length..]), Some((vec![b"PING".to_vec()], 6)));
    }

    #[test]
    fn a_reply_is_whole_or_not_there() {
        let bytes = b"*4\r\n:7\r\n$3\r\nabc\r\n*1\r\n$-1\r\n%1\r\n+k\r\n_\r\n";
        for cut in 0..bytes.len() {
            assert_eq!(parse_reply(&bytes[..cut]), None, "cut at {cut}");
        }
        let (reply, length) = parse_reply(bytes).unwrap();
        assert_eq!(length, bytes.len());
        assert_eq!(
            reply,
            Reply::Array(Some(vec![
                Reply::Int(7),
                Reply::Bulk(Some(b"abc".to_vec())),
                Reply::Array(Some(vec![Reply::Bulk(None)])),
                Reply::Array(Some(vec![Reply::Simple("k".into()), Reply::Bulk(None)])),
            ]))
        );
    }
}
