//! `leasehold show`: a lock and its line, or who waits for whom.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;

use leasehold::{LockView, Locks, Name, Query, Result};

use crate::args::ShowArgs;
use crate::graph::Graph;
use crate::view::{self, DIM, GOOD, HEADING, WARN, styled};

/// Locks asked for at a time.
const PAGE: usize = 500;
/// From locks that were named, so many owners are followed.
const MOST_OWNERS: usize = 64;

/// What to print, and the exit code.
pub(crate) async fn run(store: &str, args: &ShowArgs) -> Result<(String, u8)> {
    // A bad name is told before anything is connected.
    let names = args.names.iter().map(|name| Name::new(name.as_encoded_bytes()));
    let names = names.collect::<std::result::Result<Vec<_>, _>>()?;
    let locks = leasehold::connect(store).await?;
    if args.graph {
        let views = if names.is_empty() { waited_for(&locks).await? } else { around(&locks, names).await? };
        let graph = Graph::of(&views);
        return Ok((if args.json { view::json_line(&graph.json()) } else { graph.text() }, 0));
    }
    let mut texts = Vec::new();
    for name in names {
        let view = locks.show(name.as_bytes()).await?;
        texts.push(if args.json {
            view::json_line(&view::lock_and_line_json(&view))
        } else {
            describe(&view)
        });
    }
    Ok((texts.join(if args.json { "" } else { "\n" }), 0))
}

/// Every lock that somebody waits for.
async fn waited_for(locks: &Locks) -> Result<Vec<LockView>> {
    let mut views = Vec::new();
    let mut after = None;
    loop {
        let page = locks.inspect(&Query::Prefix { prefix: Vec::new(), after, limit: PAGE }).await?;
        for view in page.items.into_iter().filter(|view| view.waiters > 0) {
            views.push(locks.show(view.name.as_bytes()).await?);
        }
        after = page.next;
        if after.is_none() {
            return Ok(views);
        }
    }
}

/// These locks, those that their holders wait for, and so on: what a circle through any of them consists of.
async fn around(locks: &Locks, names: Vec<Name>) -> Result<Vec<LockView>> {
    let mut views = BTreeMap::new();
    let mut owners = BTreeSet::new();
    let mut open = VecDeque::from(names);
    while let Some(name) = open.pop_front() {
        if views.contains_key(&name) {
            continue;
        }
        let view = locks.show(name.as_bytes()).await?;
        let record = view.holder.as_ref().and_then(|holder| holder.record.as_ref());
        if let Some(owner) = record.and_then(|record| record.owner.clone())
            && owners.len() < MOST_OWNERS
            && owners.insert(owner.clone())
        {
            let waits = locks.inspect(&Query::Waits { owner }).await?;
            open.extend(waits.items.into_iter().map(|view| view.name));
        }
        views.insert(name, view);
    }
    Ok(views.into_values().collect())
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
            let record = holder.record.clone().unwrap_or_default();
            if record.owner.is_some() {
                lines.push(("process", view::process(&record)));
            }
            lines.extend(holder.token.map(|token| ("token", token.to_string())));
            lines.extend(view::age(holder.since_unix_micros).map(|span| ("held for", view::rough(span))));
            let left = holder.remaining.map_or_else(|| "it does not end by itself".into(), view::rough);
            lines.push(("left", left));
            lines.extend(holder.id.map(|id| ("claim", id.to_string())));
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
    if !view.queue.is_empty() {
        text.push('\n');
        text += &line(view);
    }
    text
}

/// Who waits, in order.
fn line(view: &LockView) -> String {
    let none = || styled(DIM, "-");
    let rows = view.queue.iter().zip(1_u32..).map(|(waiter, position)| {
        let record = waiter.record.as_ref();
        let label = record.and_then(|record| record.label.as_deref());
        vec![
            position.to_string(),
            view::waiter(waiter),
            record.map_or_else(none, view::process),
            view::age(waiter.since_unix_micros).map_or_else(none, view::rough),
            label.map_or_else(none, view::escaped),
        ]
    });
    view::table(&["#", "WAITER", "PROCESS", "WAITING", "LABEL"], &rows.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use leasehold::{ClaimId, Holder, Record, Waiter};
    use serde_json::json;

    use super::*;

    /// A lock held by an owner, and two who wait: one with an owner, one of whom nothing is known.
    fn view() -> LockView {
        let record = |owner: &str| Record {
            owner: Some(owner.into()),
            host: "vm\x1b".into(),
            pid: 7,
            label: Some("why\n".into()),
            ..Record::default()
        };
        let mut view = LockView::free(Name::new("x").unwrap());
        let mut holder = Holder::default();
        holder.record = Some(record("checkout 17#0f"));
        view.holder = Some(holder);
        let since = u64::try_from(leasehold::clock::wall().as_micros()).unwrap() - 61_000_000;
        view.queue = vec![
            Waiter::new(ClaimId::from_bytes([1; 16]), Some(since), Some(record("checkout 18#0f"))),
            Waiter::new(ClaimId::from_bytes([2; 16]), None, None),
        ];
        view.waiters = 2;
        view
    }

    #[test]
    fn the_line_is_shown_in_order_and_safe_to_print() {
        let text = anstream::adapter::strip_str(&describe(&view())).to_string();
        assert!(text.contains("holder      checkout 17#0f\nprocess     vm\\u{1b}:7\n"), "{text}");
        let expected = "waiting     2\n\n\
                        #  WAITER          PROCESS     WAITING  LABEL\n\
                        1  checkout 18#0f  vm\\u{1b}:7  1m 1s    why\\u{a}\n\
                        2  unknown         -           -        -\n";
        assert!(text.ends_with(expected), "{text}");
        let free = describe(&LockView::free(Name::new("x").unwrap()));
        assert!(anstream::adapter::strip_str(&free).to_string().ends_with("waiting     0\n"), "{free}");
    }

    #[test]
    fn the_line_in_json_has_places_owners_and_times() {
        let json = view::lock_and_line_json(&view());
        assert_eq!(json["waiters"], 2);
        let first = &json["queue"][0];
        assert_eq!((&first["position"], &first["owner"]), (&json!(1), &json!("checkout 18#0f")));
        assert_eq!((&first["pid"], &first["label"]), (&json!(7), &json!("why\n")));
        assert_eq!(first["claim"], "01".repeat(16));
        assert!(first["waiting_ms"].as_u64().unwrap() >= 61_000 && first["since_unix_ms"].is_u64(), "{json}");
        assert_eq!((&json["queue"][1]["position"], &json["queue"][1]["owner"]), (&json!(2), &json!(null)));
    }
}
