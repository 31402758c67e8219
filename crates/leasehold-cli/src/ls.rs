//! `leasehold ls`: the locks that are held.

use leasehold::{LockView, Query, Result};

use crate::args::LsArgs;
use crate::view::{self, DIM, WARN, styled};

/// Locks asked for at a time.
const PAGE: usize = 500;

/// What to print, and the exit code.
pub(crate) async fn run(store: &str, args: &LsArgs) -> Result<(String, u8)> {
    let locks = leasehold::connect(store).await?;
    let mut after = None;
    let mut found = Vec::new();
    loop {
        let prefix = args.prefix.as_encoded_bytes().to_vec();
        let page = locks.inspect(&Query::Prefix { prefix, after, limit: PAGE }).await?;
        found.extend(page.items);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let text = if args.json {
        view::json_lines(found.iter().map(view::lock_json))
    } else if found.is_empty() {
        format!("{}\n", styled(DIM, "no locks are held"))
    } else {
        let rows: Vec<_> = found.iter().map(row).collect();
        view::table(&["NAME", "HOLDER", "TOKEN", "HELD FOR", "LEFT", "WAITING", "LABEL"], &rows)
    };
    Ok((text, 0))
}

fn row(view: &LockView) -> Vec<String> {
    let none = || styled(DIM, "-");
    let holder = view.holder.as_ref();
    let label = holder.and_then(|holder| holder.record.as_ref()?.label.clone());
    vec![
        view.name.to_string(),
        holder.map_or_else(none, |holder| styled(WARN, view::who(holder))),
        holder.and_then(|holder| holder.token).map_or_else(none, |token| token.to_string()),
        holder.and_then(|holder| view::age(holder.since_unix_micros)).map_or_else(none, view::rough),
        holder.and_then(|holder| holder.remaining).map_or_else(none, view::rough),
        view.waiters.to_string(),
        label.map_or_else(none, |label| view::escaped(&label)),
    ]
}
