//! All sentinels are asked now and then: the one that is listened to may be on the smaller side of a split.

use std::sync::{Arc, Weak};
use std::time::Duration;

use redis::ProtocolVersion;
use redis::aio::MultiplexedConnection;
use tokio::task::JoinSet;

use super::super::connection::Connector;
use super::{Named, master, open};
use crate::clock;

/// How often. Two small commands to each sentinel, on a connection that is kept.
const EVERY: Duration = Duration::from_secs(3);

/// Asks them for as long as there is a connector.
pub(super) async fn survey(connector: Weak<Connector>) {
    let mut kept: Vec<Option<MultiplexedConnection>> = Vec::new();
    loop {
        clock::sleep(EVERY * 3 / 4 + clock::jitter(EVERY / 2)).await;
        let Some(alive) = connector.upgrade() else { return };
        let sentinels = alive.sentinels().map_or(0, |sentinels| sentinels.hosts.len());
        kept.resize_with(sentinels, || None);
        let mut asked = JoinSet::new();
        for (number, connection) in kept.iter_mut().map(Option::take).enumerate() {
            let alive = alive.clone();
            asked.spawn(async move { (number, ask(&alive, number, connection).await) });
        }
        let mut answers = Vec::new();
        while let Some(answer) = asked.join_next().await {
            if let Ok((number, Some((connection, named)))) = answer {
                kept[number] = Some(connection);
                answers.push(named);
            }
        }
        for named in answers.iter().filter(|named| named.epoch > 0) {
            alive.master_is(named, false);
        }
        alive.masters_are(&answers, sentinels);
    }
}

async fn ask(
    connector: &Arc<Connector>,
    number: usize,
    kept: Option<MultiplexedConnection>,
) -> Option<(MultiplexedConnection, Named)> {
    let deadline = clock::now().plus(connector.timeout() / 2);
    let mut connection = match kept {
        Some(connection) => connection,
        None => open(connector, number, ProtocolVersion::RESP2, None, deadline).await.ok()?.ok()?,
    };
    let named = master(connector, &mut connection, deadline).await.ok()?;
    Some((connection, named))
}
