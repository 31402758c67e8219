//! How locks look: aligned and coloured for people, JSON for programs.

use std::fmt::Write as _;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use leasehold::{Escaped, Holder, LockView, Name, Record, Waiter};
use serde_json::{Value, json};

use crate::plan::human;

/// For headings.
pub(crate) const HEADING: Style = Style::new().bold();
/// For what is well, or free.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// For what deserves a look, or is held.
pub(crate) const WARN: Style = AnsiColor::Yellow.on_default();
/// For what is broken.
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
/// For what can be skipped.
pub(crate) const DIM: Style = Style::new().dimmed();

/// `text` in a style; the style is left out again where nobody can see it.
pub(crate) fn styled(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// One lock as JSON.
pub(crate) fn lock_json(view: &LockView) -> Value {
    let mut object = named_json(&view.name, "name");
    object["held"] = view.holder.is_some().into();
    object["holder"] = view.holder.as_ref().map(holder_json).into();
    object["last_token"] = json!(view.last_token);
    object["waiters"] = view.waiters.into();
    object
}

/// One lock and its line as JSON.
pub(crate) fn lock_and_line_json(view: &LockView) -> Value {
    let mut object = lock_json(view);
    let queue = view.queue.iter().zip(1_u64..).map(|(waiter, position)| waiter_json(waiter, position));
    object["queue"] = queue.collect();
    object
}

/// An object that says which lock it is about, under that key.
pub(crate) fn named_json(name: &Name, key: &str) -> Value {
    let shown = name.to_string();
    let mut object = json!({ key: shown });
    // Where the name had to be escaped to be shown, the bytes tell which lock it really is.
    if shown.as_bytes() != name.as_bytes() {
        let hex = name.as_bytes().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        object[format!("{key}_hex")] = hex.into();
    }
    object
}

/// One object a line.
pub(crate) fn json_lines(objects: impl IntoIterator<Item = Value>) -> String {
    objects.into_iter().fold(String::new(), |text, object| text + &json_line(&object))
}

/// One object in a line that does nothing to a terminal: what would is written as `\uXXXX`, which means the same.
pub(crate) fn json_line(object: &Value) -> String {
    let plain = object.to_string();
    let mut text = String::with_capacity(plain.len() + 1);
    for c in plain.chars() {
        // Only strings can hold them: the encoder has escaped what is below the space, and the rest of JSON is ASCII.
        if escaped(c.encode_utf8(&mut [0; 4])).starts_with('\\') && c != '\\' {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        } else {
            text.push(c);
        }
    }
    text + "\n"
}

/// A holder as JSON.
pub(crate) fn holder_json(holder: &Holder) -> Value {
    let record = holder.record.clone().unwrap_or_default();
    json!({
        "token": holder.token,
        "owner": record.owner,
        "host": record.host,
        "pid": record.pid,
        "label": record.label,
        "meta": record.metadata,
        "remaining_ms": holder.remaining.map(millis),
        "since_unix_ms": holder.since_unix_micros.map(|micros| micros / 1000),
        "claim": holder.id.map(|id| id.to_string()),
        "foreign": holder.foreign,
    })
}

/// A place in line as JSON.
fn waiter_json(waiter: &Waiter, position: u64) -> Value {
    let record = waiter.record.clone().unwrap_or_default();
    json!({
        "position": position,
        "owner": record.owner,
        "host": record.host,
        "pid": record.pid,
        "label": record.label,
        "meta": record.metadata,
        "since_unix_ms": waiter.since_unix_micros.map(|micros| micros / 1000),
        "waiting_ms": age(waiter.since_unix_micros).map(millis),
        "claim": waiter.id.to_string(),
    })
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Who holds it, in a word or two that are safe to print.
pub(crate) fn who(holder: &Holder) -> String {
    match (&holder.record, &holder.foreign) {
        (_, Some(foreign)) => format!("another library ({foreign})"),
        (Some(record), None) => owner_or_process(record),
        (None, None) => "unknown".into(),
    }
}

/// Who waits, in a word or two that are safe to print.
pub(crate) fn waiter(waiter: &Waiter) -> String {
    waiter.record.as_ref().map_or_else(|| "unknown".into(), owner_or_process)
}

fn owner_or_process(record: &Record) -> String {
    record.owner.as_deref().map_or_else(|| process(record), escaped)
}

/// The process of a claim, safe to print.
pub(crate) fn process(record: &Record) -> String {
    format!("{}:{}", escaped(&record.host), record.pid)
}

/// Text of a stranger, safe to print.
pub(crate) fn escaped(text: &str) -> String {
    Escaped(text.as_bytes()).to_string()
}

/// How long ago that was, by the wall clock.
pub(crate) fn age(unix_micros: Option<u64>) -> Option<Duration> {
    let since = Duration::from_micros(unix_micros?);
    leasehold::clock::wall().checked_sub(since)
}

/// A duration to the second from ten seconds on: more digits would only look exact.
pub(crate) fn rough(span: Duration) -> String {
    human(if span >= Duration::from_secs(10) { Duration::from_secs(span.as_secs()) } else { span })
}

/// Columns of text, aligned by what is seen of them.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = headings
        .iter()
        .enumerate()
        .map(|(at, heading)| {
            rows.iter().map(|row| width(&row[at])).chain([width(heading)]).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = String>| {
        let padded = cells.zip(&widths).map(|(cell, &wide)| {
            let padding = wide - width(&cell);
            format!("{cell}{:padding$}", "")
        });
        let joined = padded.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "{}", joined.trim_end());
    };
    line(&mut headings.iter().map(|heading| styled(HEADING, heading)));
    for row in rows {
        line(&mut row.iter().cloned());
    }
    text
}

/// The columns that a text takes, without its colours.
fn width(text: &str) -> usize {
    anstream::adapter::strip_str(text).to_string().chars().count()
}

#[cfg(test)]
mod tests {
    use leasehold::{FencingToken, Name, Record};

    use super::*;

    #[test]
    fn columns_line_up_whatever_their_colours() {
        let rows = vec![vec![styled(BAD, "é"), "1".into()], vec!["long".into(), styled(GOOD, "2")]];
        let text = anstream::adapter::strip_str(&table(&["A", "B"], &rows)).to_string();
        assert_eq!(text, "A     B\né     1\nlong  2\n");
    }

    #[test]
    fn json_says_the_same_without_a_character_that_a_terminal_obeys() {
        let object = json!({ "label": "\u{9b}31m \u{202e}\u{7f}\n é \\ \u{1f600}", "n": 1 });
        let line = json_line(&object);
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), object);
        assert_eq!(escaped(line.trim_end()), line.trim_end());
        assert!(line.contains("\\u009b31m \\u202e\\u007f\\n é \\\\ \u{1f600}"), "{line}");
    }

    #[test]
    fn what_a_stranger_wrote_cannot_reach_the_terminal_as_it_is() {
        let mut view = LockView::free(Name::new(b"a\x1b[2J\xff").unwrap());
        let mut holder = Holder::default();
        holder.token = Some(FencingToken::new(7));
        holder.record = Some(Record { host: "h\x1b]0;x\x07".into(), pid: 3, ..Record::default() });
        assert_eq!(who(&holder), "h\\u{1b}]0;x\\u{7}:3");
        view.holder = Some(holder);
        let json = lock_json(&view);
        assert_eq!(json["name"], "a\\u{1b}[2J\\xff");
        assert_eq!(json["name_hex"], "611b5b324aff");
        assert_eq!(json["holder"]["token"], 7);
    }
}
