//! `leasehold show`: one lock.

use std::fmt::Write as _;

use leasehold::{LockView, Result};

use crate::args::ShowArgs;
use crate::view::{self, GOOD, HEADING, WARN, styled};

/// What to print, and the exit code.
pub(crate) async fn run(store: &str, args: &ShowArgs) -> Result<(String, u8)> {
    // A bad name is told before anything is connected.
    let name = leasehold::Name::new(args.name.as_encoded_bytes())?;
    let locks = leasehold::connect(store).await?;
    let view = locks.show(name.as_bytes()).await?;
    let text = if args.json { view::json_lines([view::lock_json(&view)]) } else { describe(&view) };
    Ok((text, 0))
}

fn describe(view: &LockView) -> String {
    let mut lines: Vec<(&str, String)> = vec![("name", view.name.to_string())];
    match &view.holder {
        None => {
            lines.push(("state", styled(GOOD, "free")));
            lines.extend(view.last_token.map(|token| ("last token", token.to_string())));
        }
        Some(holder) => {
            lines.push(("state", styled(WARN, "held")));
            lines.push(("holder", view::who(holder)));
            lines.extend(holder.token.map(|token| ("token", token.to_string())));
            lines.extend(view::held_for(holder).map(|span| ("held for", view::rough(span))));
            let left = holder.remaining.map_or_else(|| "it does not end by itself".into(), view::rough);
            lines.push(("left", left));
            lines.extend(holder.id.map(|id| ("claim", id.to_string())));
            let record = holder.record.clone().unwrap_or_default();
            lines.extend(record.label.map(|label| ("label", view::escaped(&label))));
            for (key, value) in &record.metadata {
                lines.push(("meta", format!("{}={}", view::escaped(key), view::escaped(value))));
            }
        }
    }
    lines.push(("waiting", view.waiters.to_string()));
    let mut text = String::new();
    for (key, value) in lines {
        let padding = 10 - key.len();
        let _ = writeln!(text, "{}{:padding$}  {value}", styled(HEADING, key), "");
    }
    text
}
