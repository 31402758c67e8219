//! The waiting room: the claims of this store that stand in line, shared by the thread that goes the rounds for them and
//! by whoever waits for their news.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::lifeline::LifelineId;
use crate::clock::{self, Instant, Now};
use crate::store::{Woken, alive_for};
use crate::types::{Claim, ClaimId, Grant, Name, Ticket};

/// Everybody who waits through this store, by lock.
#[derive(Debug, Default)]
pub(super) struct Room {
    lanes: Mutex<HashMap<Name, Lane>>,
}

/// Those who wait for one lock, and when to look at it next.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) waiting: HashMap<ClaimId, Arc<Waiting>>,
    pub(super) look_at: Instant,
    /// Processes before us whose death matters: the holder, and those who will hold it before us.
    pub(super) watched: Vec<LifelineId>,
}

/// One claim in line.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) claim: Claim,
    news: Mutex<News>,
    bell: Notify,
}

#[derive(Debug)]
struct News {
    /// A moment before the last look that found the claim in line.
    seen: Now,
    ticket: Ticket,
    /// The place that was told last.
    told: Option<u64>,
    /// Whether the place in line is another by now, and is to be told.
    moved: bool,
    granted: Option<Grant>,
    look: bool,
    /// How many futures wait for news.
    attended: u32,
    /// When somebody last asked for news or presented the claim.
    touched: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Room {
    /// All lanes. Held for moments only, never while the database is waited for, and never while somebody is woken: who
    /// wakes may come back here.
    pub(super) fn lanes(&self) -> MutexGuard<'_, HashMap<Name, Lane>> {
        lock(&self.lanes)
    }

    /// The claim was put in line, or still stands there: it was presented at `sent`.
    pub(super) fn seat(&self, claim: &Claim, ticket: &Ticket, sent: Now, look_at: Instant) {
        let mut lanes = self.lanes();
        let lane = lanes.entry(claim.name.clone()).or_insert_with(|| Lane {
            waiting: HashMap::new(),
            look_at,
            watched: Vec::new(),
        });
        lane.look_at = lane.look_at.min(look_at);
        if let Some(known) = lane.waiting.get(&claim.id) {
            let mut news = lock(&known.news);
            (news.seen, news.touched) = (sent, clock::now());
            (news.moved, news.granted, news.look) = (false, None, false);
            news.told = ticket.ahead();
            news.ticket = ticket.clone();
            return;
        }
        let news = News {
            seen: sent,
            ticket: ticket.clone(),
            told: ticket.ahead(),
            moved: false,
            granted: None,
            look: false,
            attended: 0,
            touched: clock::now(),
        };
        let waiting = Waiting { claim: claim.clone(), news: Mutex::new(news), bell: Notify::new() };
        lane.waiting.insert(claim.id, Arc::new(waiting));
    }

    /// The claim does not stand in line any more, and whoever asked knows.
    pub(super) fn leave(&self, name: &Name, id: ClaimId) {
        let mut lanes = self.lanes();
        let Some(lane) = lanes.get_mut(name) else { return };
        let left = lane.waiting.remove(&id);
        if lane.waiting.is_empty() {
            lanes.remove(name);
        }
        drop(lanes);
        if let Some(waiting) = left {
            waiting.tell_to_look();
        }
    }

    pub(super) fn find(&self, name: &Name, id: ClaimId) -> Option<Arc<Waiting>> {
        self.lanes().get(name)?.waiting.get(&id).cloned()
    }

    /// Whether somebody is there to take a lock that is handed to this claim.
    pub(super) fn is_attended(&self, name: &Name, id: ClaimId, now: Instant) -> bool {
        self.find(name, id).is_some_and(|waiting| !waiting.is_abandoned(now))
    }

    /// Everybody is to present again.
    pub(super) fn tell_all_to_look(&self) {
        self.everybody().iter().for_each(|waiting| waiting.tell_to_look());
    }

    /// All who wait.
    pub(super) fn everybody(&self) -> Vec<Arc<Waiting>> {
        self.lanes().values().flat_map(|lane| lane.waiting.values()).cloned().collect()
    }

    /// All who wait for one lock.
    pub(super) fn waiting_for(&self, name: &Name) -> Vec<Arc<Waiting>> {
        self.lanes().get(name).into_iter().flat_map(|lane| lane.waiting.values()).cloned().collect()
    }

    /// Waits for news of a claim; `Look` at once for one that is not here.
    pub(super) async fn woken(&self, ticket: &Ticket) -> Woken {
        let Some(waiting) = self.find(&ticket.name, ticket.id) else { return Woken::Look };
        let attending = Attending::new(&waiting);
        loop {
            let (news, until) = waiting.take();
            match news {
                Some(news @ Woken::Granted { .. }) => {
                    drop(attending);
                    // From here on the caller has it.
                    self.leave(&ticket.name, ticket.id);
                    return news;
                }
                Some(news) => return news,
                None => {}
            }
            // Were the rounds to stand still, the place would be lost: then presenting again tells why.
            let heard = clock::timeout_at(until, waiting.bell.notified()).await;
            if heard.is_none() && clock::now() >= waiting.stale_at() {
                return Woken::Look;
            }
        }
    }
}

impl Waiting {
    /// What there is to tell, and until when to wait for it.
    fn take(&self) -> (Option<Woken>, Instant) {
        let mut news = lock(&self.news);
        let told = if let Some(grant) = news.granted {
            Some(Woken::Granted { grant, sent: news.seen })
        } else if std::mem::take(&mut news.look) {
            Some(Woken::Look)
        } else if std::mem::take(&mut news.moved) {
            Some(Woken::Waiting(news.ticket.clone()))
        } else {
            None
        };
        (told, news.seen.boot.plus(alive_for(self.claim.ttl)))
    }

    fn stale_at(&self) -> Instant {
        lock(&self.news).seen.boot.plus(alive_for(self.claim.ttl))
    }

    /// Whether nobody has waited for it or presented it for so long that it counts as gone.
    pub(super) fn is_abandoned(&self, now: Instant) -> bool {
        let news = lock(&self.news);
        news.attended == 0 && news.touched.plus(alive_for(self.claim.ttl)) <= now
    }

    /// The claim was handed the lock.
    pub(super) fn grant(&self, grant: Grant) {
        lock(&self.news).granted = Some(grant);
        self.bell.notify_one();
    }

    /// The claim was in line at a look that began after `seen`. A place that changed is told if `tell` says so.
    pub(super) fn place(&self, ticket: Ticket, seen: Now, tell: bool) {
        let mut news = lock(&self.news);
        news.seen = seen;
        let moved = tell && news.told != ticket.ahead();
        if moved {
            news.told = ticket.ahead();
            news.moved = true;
        }
        news.ticket = ticket;
        drop(news);
        if moved {
            self.bell.notify_one();
        }
    }

    /// The claim neither stands in line nor holds the lock, or it cannot be known.
    pub(super) fn tell_to_look(&self) {
        lock(&self.news).look = true;
        self.bell.notify_one();
    }
}

/// Somebody waits for news of a claim, as long as this lives.
struct Attending<'a>(&'a Waiting);

impl<'a> Attending<'a> {
    fn new(waiting: &'a Waiting) -> Self {
        let mut news = lock(&waiting.news);
        news.attended += 1;
        news.touched = clock::now();
        drop(news);
        Self(waiting)
    }
}

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        let mut news = lock(&self.0.news);
        news.attended -= 1;
        news.touched = clock::now();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::*;
    use crate::types::FencingToken;

    fn seated(room: &Room, ttl: Duration) -> (Claim, Ticket) {
        let claim = Claim::new(Name::new("a").unwrap(), clock::claim_id(), ttl);
        let ticket = Ticket::new(&claim).with_ahead(0);
        room.seat(&claim, &ticket, clock::look(), Instant::FAR);
        (claim, ticket)
    }

    fn grant(ttl: Duration) -> Grant {
        Grant { token: FencingToken::new(7), ttl, session: 0 }
    }

    #[test]
    fn a_grant_that_came_while_nobody_waited_is_told_by_the_next_call_and_once() {
        let room = Room::default();
        let (claim, ticket) = seated(&room, Duration::from_secs(30));
        {
            let mut woken = pin!(room.woken(&ticket));
            assert!(woken.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            room.find(&claim.name, claim.id).unwrap().grant(grant(claim.ttl));
        }
        assert!(matches!(pollster::block_on(room.woken(&ticket)), Woken::Granted { .. }));
        assert!(matches!(pollster::block_on(room.woken(&ticket)), Woken::Look));
        assert!(room.lanes().is_empty());
    }

    #[test]
    fn a_claim_is_abandoned_when_nobody_has_waited_for_it_for_a_while() {
        let room = Room::default();
        let (claim, ticket) = seated(&room, Duration::from_secs(3));
        let late = clock::now().plus(Duration::from_secs(60));
        let waiting = room.find(&claim.name, claim.id).unwrap();
        assert!(!waiting.is_abandoned(clock::now()) && waiting.is_abandoned(late));
        {
            let mut woken = pin!(room.woken(&ticket));
            assert!(woken.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            assert!(!waiting.is_abandoned(late), "somebody waits");
        }
        assert!(waiting.is_abandoned(late) && !room.is_attended(&claim.name, claim.id, late));
    }

    #[test]
    fn a_place_that_changed_is_told_and_one_that_stands_still_is_not() {
        let room = Room::default();
        let (claim, ticket) = seated(&room, Duration::from_secs(30));
        let waiting = room.find(&claim.name, claim.id).unwrap();
        waiting.place(Ticket::new(&claim).with_ahead(0), clock::look(), true);
        waiting.place(Ticket::new(&claim).with_ahead(2), clock::look(), false);
        let mut woken = Box::pin(room.woken(&ticket));
        assert!(woken.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        waiting.place(Ticket::new(&claim).with_ahead(3), clock::look(), true);
        match pollster::block_on(woken) {
            Woken::Waiting(now) => assert_eq!(now.ahead(), Some(3)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn when_nobody_goes_the_rounds_the_claim_is_to_be_presented_again() {
        let room = Room::default();
        let (_, ticket) = seated(&room, Duration::from_millis(20));
        assert!(matches!(pollster::block_on(room.woken(&ticket)), Woken::Look));
    }
}
