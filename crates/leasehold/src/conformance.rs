//! One test function for each clause of the [store contract](crate::store), over any [`Store`].
//!
//! Run them all for a store of your own:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! use leasehold::{conformance, stores::memory::MemoryStore};
//! let store = MemoryStore::new();
//! for clause in conformance::CLAUSES {
//!     (clause.check)(&store).await; // panics with what went wrong
//! }
//! # }
//! ```

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::clock::{self, Instant};
use crate::error::ErrorKind;
use crate::store::{Store, Woken};
use crate::types::{
    Acquired, Claim, FencingToken, Grant, Guarantees, Held, LockView, MAX_NAME_BYTES, Name, Query, Record,
    Released, Renewal, Waiter,
};

/// A check under way.
pub type Check<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// A clause of the contract and its check.
#[derive(Clone, Copy, Debug)]
pub struct Clause {
    /// The number in the contract.
    pub number: u8,
    /// The name of the check.
    pub name: &'static str,
    /// The check. It panics if the store breaks the clause.
    pub check: for<'a> fn(&'a dyn Store) -> Check<'a>,
}

macro_rules! clauses {
    ($($number:literal $name:ident),* $(,)?) => {
        /// Every clause of the contract, in order.
        pub const CLAUSES: &[Clause] = &[$(Clause {
            number: $number,
            name: stringify!($name),
            check: |store| Box::pin($name(store)),
        }),*];
    };
}

clauses! {
    1 one_holder,
    2 same_claim_same_grant,
    3 release_by_a_stranger_changes_nothing,
    4 releasing_again_is_an_answer,
    5 an_unrenewed_claim_becomes_free,
    6 renewing_after_a_loss_says_lost,
    7 tokens_grow,
    8 the_line_is_served_in_order,
    9 a_cancelled_acquire_leaves_nothing,
    10 a_late_request_creates_nothing,
    11 names_never_collide,
    12 leases_are_bounded_and_counted_from_before,
    13 a_dead_waiter_delays_nobody_for_long,
}

const TTL: Duration = Duration::from_secs(30);
/// How long one who gives up stands in line at most: far shorter than a lease.
const MOMENT: Duration = Duration::from_millis(100);

/// A name that no other test and no other run has.
fn fresh(what: &str) -> Name {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Name::new(format!("conformance:{}:{count}:{what}", &clock::claim_id().to_string()[..12]))
        .expect("it is valid")
}

fn claim(name: &Name, ttl: Duration) -> Claim {
    Claim::new(name.clone(), clock::claim_id(), ttl)
}

async fn granted(store: &dyn Store, claim: &Claim) -> Grant {
    match store.acquire(claim).await {
        Ok(Acquired::Granted(grant)) => grant,
        other => panic!("{} should have been granted: {other:?}", claim.name),
    }
}

async fn refused(store: &dyn Store, claim: &Claim) -> Option<crate::types::Holder> {
    match store.acquire(claim).await {
        Ok(Acquired::Busy(holder)) => Some(holder),
        Ok(Acquired::Queued(_)) => None,
        other => panic!("{} should have been busy: {other:?}", claim.name),
    }
}

async fn released(store: &dyn Store, held: &Held) -> Released {
    store.release(held).await.expect("a release is answered")
}

async fn renewed(store: &dyn Store, held: &Held) -> Renewal {
    let mut answers = store.renew(std::slice::from_ref(held)).await;
    assert_eq!(answers.len(), 1, "one answer for each item");
    answers.remove(0).expect("a renewal is answered")
}

/// The moment by which `name` is free, waited for as a waiter would: by trying.
async fn free_by(store: &dyn Store, name: &Name, latest: Instant) -> Grant {
    let waiter = claim(name, TTL);
    loop {
        let looked_at = clock::now();
        match store.acquire(&waiter).await.expect("an acquire is answered") {
            Acquired::Granted(grant) => {
                released(store, &Held::new(&waiter, &grant)).await;
                return grant;
            }
            _ if looked_at < latest => clock::sleep(Duration::from_millis(5)).await,
            other => panic!("{name} should have been free by now: {other:?}"),
        }
    }
}

/// Time that a busy test machine may take to come back to us; never a bound on the store itself.
const GRACE: Duration = Duration::from_secs(2);

fn free_again(guarantees: &Guarantees, ttl: Duration) -> Instant {
    clock::now().plus(ttl).plus(guarantees.slack).plus(GRACE)
}

/// Clause 1: between a grant and the end of its lease nobody else is granted the name.
pub async fn one_holder(store: &dyn Store) {
    let name = fresh("one");
    let (first, second) = (claim(&name, TTL), claim(&name, TTL));
    let grant = granted(store, &first).await;
    let holder = refused(store, &second).await;
    if let Some(holder) = holder {
        assert_eq!((holder.id, holder.token), (Some(first.id), Some(grant.token)), "the holder is named");
        assert!(holder.remaining.is_some_and(|left| left <= TTL), "{:?}", holder.remaining);
    }
    assert_eq!(released(store, &Held::new(&first, &grant)).await, Released::Released);
    granted(store, &second).await;
    refused(store, &first).await;

    // The same at the end of a lease that nobody releases.
    let short = store.guarantees().least_ttl.max(Duration::from_millis(150));
    let name = fresh("one-expiring");
    let sent = clock::now();
    let holder = claim(&name, short);
    let grant = granted(store, &holder).await;
    let trusted = crate::lease::valid_until(sent, grant.ttl);
    let waiter = claim(&name, TTL);
    loop {
        let asked = store.acquire(&waiter).await.expect("an acquire is answered");
        match asked {
            Acquired::Granted(_) => break,
            _ => clock::sleep(Duration::from_millis(2)).await,
        }
    }
    assert!(clock::now() >= trusted, "granted to another while the first could still be trusted");
}

/// Clause 2: the same claim presented twice yields the same grant and the same token.
pub async fn same_claim_same_grant(store: &dyn Store) {
    let name = fresh("same");
    let mine = claim(&name, TTL);
    let first = granted(store, &mine).await;
    for _ in 0..3 {
        let again = granted(store, &mine).await;
        assert_eq!(again.token, first.token);
        assert!(again.ttl <= TTL, "presenting again must not add time: {:?}", again.ttl);
    }
    refused(store, &claim(&name, TTL)).await;
    assert_eq!(released(store, &Held::new(&mine, &first)).await, Released::Released);
    granted(store, &claim(&name, TTL)).await;
}

/// Clause 3: release by a claim that does not hold changes nothing and says which case it was.
pub async fn release_by_a_stranger_changes_nothing(store: &dyn Store) {
    let name = fresh("stranger");
    let (holder, stranger) = (claim(&name, TTL), claim(&name, TTL));
    assert_eq!(released(store, &Held::unanswered(&stranger)).await, Released::NotHeld);
    let grant = granted(store, &holder).await;
    assert_eq!(released(store, &Held::unanswered(&claim(&name, TTL))).await, Released::HeldByOther);
    // Also with the holder's token: the claim decides.
    assert_eq!(released(store, &Held::new(&claim(&name, TTL), &grant)).await, Released::HeldByOther);
    let still = Held { extend: None, ..Held::new(&holder, &grant) };
    assert!(matches!(renewed(store, &still).await, Renewal::Renewed(_)));
}

/// Clause 4: releasing twice, or after expiry, is an answer.
pub async fn releasing_again_is_an_answer(store: &dyn Store) {
    let name = fresh("again");
    let mine = claim(&name, TTL);
    let held = Held::new(&mine, &granted(store, &mine).await);
    assert_eq!(released(store, &held).await, Released::Released);
    assert_eq!(released(store, &held).await, Released::NotHeld);
    let short = store.guarantees().least_ttl.max(Duration::from_millis(50));
    let brief = claim(&name, short);
    let held = Held::new(&brief, &granted(store, &brief).await);
    free_by(store, &name, free_again(&store.guarantees(), short)).await;
    assert_eq!(released(store, &held).await, Released::NotHeld);
    let next = claim(&name, TTL);
    let _ = granted(store, &next).await;
    assert_eq!(released(store, &held).await, Released::HeldByOther);
}

/// Clause 5: an unrenewed claim is free within its TTL and the slack, without any message.
pub async fn an_unrenewed_claim_becomes_free(store: &dyn Store) {
    let name = fresh("unrenewed");
    let short = store.guarantees().least_ttl.max(Duration::from_millis(100));
    let _ = granted(store, &claim(&name, short)).await;
    free_by(store, &name, free_again(&store.guarantees(), short)).await;
}

/// Clause 6: renewing after a loss says `Lost`, re-creates nothing, and never shortens a lease.
pub async fn renewing_after_a_loss_says_lost(store: &dyn Store) {
    let name = fresh("renew");
    let mine = claim(&name, TTL);
    let grant = granted(store, &mine).await;
    let held = Held::new(&mine, &grant);
    let shorter = Held { extend: Some(TTL / 3), ..held.clone() };
    let Renewal::Renewed(left) = renewed(store, &shorter).await else { panic!("it is held") };
    assert!(left > TTL / 2 && left <= TTL, "renewing shortened the lease to {left:?}");
    let longer = Held { extend: Some(TTL * 2), ..held.clone() };
    let Renewal::Renewed(left) = renewed(store, &longer).await else { panic!("it is held") };
    assert!(left > TTL && left <= TTL * 2, "renewing did not lengthen the lease: {left:?}");
    let confirm = Held { extend: None, ..held.clone() };
    let Renewal::Renewed(same) = renewed(store, &confirm).await else { panic!("it is held") };
    assert!(same <= left, "confirming adds no time");

    // A batch: each item has its own answer, whatever the others have.
    let strange = Held::unanswered(&claim(&name, TTL));
    let free = Held::unanswered(&claim(&fresh("free"), TTL));
    let answers = store.renew(&[strange, held.clone(), free.clone()]).await;
    let answers: Vec<_> = answers.into_iter().map(|answer| answer.expect("answered")).collect();
    assert!(matches!(answers[..], [Renewal::Lost, Renewal::Renewed(_), Renewal::Lost]), "{answers:?}");
    assert!(store.renew(&[]).await.is_empty());

    assert_eq!(released(store, &held).await, Released::Released);
    assert_eq!(renewed(store, &held).await, Renewal::Lost);
    assert_eq!(renewed(store, &free).await, Renewal::Lost);
    // The same claim, granted anew: what it held before is lost all the same.
    let anew = Held::new(&mine, &granted(store, &mine).await);
    assert_eq!(renewed(store, &held).await, Renewal::Lost, "a grant that was lost came back by its claim");
    assert!(matches!(renewed(store, &anew).await, Renewal::Renewed(_)));
    assert_eq!(released(store, &anew).await, Released::Released);
    let next = claim(&name, TTL);
    let grant = granted(store, &next).await;
    assert_eq!(renewed(store, &held).await, Renewal::Lost, "a renewal took over another's lock");
    assert_eq!(released(store, &Held::new(&next, &grant)).await, Released::Released);
}

/// Clause 7: each grant of a name has a larger token than every earlier one.
pub async fn tokens_grow(store: &dyn Store) {
    let (name, other) = (fresh("tokens"), fresh("other-tokens"));
    let short = store.guarantees().least_ttl.max(Duration::from_millis(30));
    let mut last = FencingToken::new(0);
    for round in 0..12 {
        // Released, or left to expire; other names in between make no difference.
        let expires = round % 4 == 3;
        let mine = claim(&name, if expires { short } else { TTL });
        let grant = granted(store, &mine).await;
        assert!(grant.token > last, "{} after {last}", grant.token);
        assert!(grant.token.get() <= FencingToken::MAX);
        last = grant.token;
        if expires {
            let grant = free_by(store, &name, free_again(&store.guarantees(), short)).await;
            assert!(grant.token > last);
            last = grant.token;
        } else {
            assert_eq!(released(store, &Held::new(&mine, &grant)).await, Released::Released);
        }
        let _ = granted(store, &claim(&other, short)).await;
        free_by(store, &other, free_again(&store.guarantees(), short)).await;
    }
    tokens_in_a_block(store).await;
    tokens_that_are_proposed(store).await;
}

/// A token that a claim proposes is taken if it is larger than the last one and not far ahead of the clock; whoever holds
/// raises its own token so, and nothing lowers one.
async fn tokens_that_are_proposed(store: &dyn Store) {
    let name = fresh("proposed");
    let mut last = granted(store, &claim(&name, TTL)).await.token;
    let name = fresh("proposed-anew");
    let minute = 60_000_000;
    // Nobody had it yet; then with a last token before it.
    for _ in 0..2 {
        let mine = claim(&name, TTL).with_ballot(FencingToken::new(last.get() + minute));
        let grant = granted(store, &mine).await;
        assert_eq!(Some(grant.token), mine.ballot, "a larger token was proposed and not taken");
        let again = granted(store, &mine).await;
        assert_eq!(again.token, grant.token, "the same proposal again changes nothing");
        let raised = mine.clone().with_ballot(FencingToken::new(grant.token.get() + 7));
        let raised = granted(store, &raised).await;
        assert_eq!(raised.token.get(), grant.token.get() + 7, "the holder's token was not raised");
        assert!(raised.ttl <= TTL, "raising must not add time");
        let held = Held::new(&mine, &raised);
        assert_eq!(renewed(store, &Held::new(&mine, &grant)).await, Renewal::Lost, "the old token's hold");
        assert!(matches!(renewed(store, &held).await, Renewal::Renewed(_)));
        for refused in [grant.token.get(), raised.token.get() + 7200 * 1_000_000] {
            let stays = granted(store, &mine.clone().with_ballot(FencingToken::new(refused))).await;
            assert_eq!(stays.token, raised.token, "{refused} was proposed");
        }
        let holder = refused(store, &claim(&name, TTL)).await;
        assert!(holder.is_none_or(|holder| holder.token == Some(raised.token)));
        assert_eq!(released(store, &held).await, Released::Released);
        last = raised.token;
    }
    // Where no last token is known, an old one could have been given out before.
    let unknown =
        claim(&fresh("proposed-old"), TTL).with_ballot(FencingToken::new(last.get() - 7200 * 1_000_000));
    let grant = granted(store, &unknown).await;
    assert!(grant.token.get() > last.get() - 3600 * 1_000_000, "an old token was taken: {}", grant.token);
    assert_eq!(released(store, &Held::new(&unknown, &grant)).await, Released::Released);
    // One that is not larger, or far ahead, is passed over; so is one that leaves no room for a block.
    for proposed in [1, last.get(), last.get() + 7200 * 1_000_000, FencingToken::MAX] {
        let mine = claim(&name, TTL).with_ballot(FencingToken::new(proposed));
        let grant = granted(store, &mine).await;
        assert!(grant.token > last && grant.token.get() < last.get() + minute, "{proposed}: {}", grant.token);
        assert_eq!(released(store, &Held::new(&mine, &grant)).await, Released::Released);
        last = grant.token;
    }
    let block = claim(&name, TTL).with_tokens(10).with_ballot(FencingToken::new(last.get() + 100));
    let first = granted(store, &block).await;
    assert_eq!(Some(first.token), block.ballot);
    let raised = granted(store, &block.clone().with_ballot(FencingToken::new(first.token.get() + 100))).await;
    // A token of the block is one of its own, and used up.
    let inside = granted(store, &block.clone().with_ballot(FencingToken::new(raised.token.get() + 5))).await;
    assert_eq!(inside.token, raised.token);
    assert_eq!(released(store, &Held::new(&block, &raised)).await, Released::Released);
    let next = granted(store, &claim(&name, TTL)).await;
    assert!(next.token.get() >= first.token.get() + 110, "{} within a raised block", next.token);
}

/// A claim that is not to queue neither waits nor joins a queue.
async fn a_claim_that_is_not_to_queue_does_not_wait(store: &dyn Store) {
    let name = fresh("no-queue");
    let holder = claim(&name, TTL);
    let grant = granted(store, &holder).await;
    for _ in 0..3 {
        match store.acquire(&claim(&name, TTL)).await {
            Ok(Acquired::Busy(_)) => {}
            other => panic!("neither waits nor queues: {other:?}"),
        }
    }
    assert_eq!(view(store, &name).await.waiters, 0);
    assert_eq!(released(store, &Held::new(&holder, &grant)).await, Released::Released);
    let view = view(store, &name).await;
    assert!(view.holder.is_none(), "nobody got it by having tried before: {view:?}");
}

/// Clause 8: a claim that is not to queue neither waits nor joins the line; a FIFO store grants in the order of arrival,
/// tells the place in line, and refuses where the line is full.
pub async fn the_line_is_served_in_order(store: &dyn Store) {
    a_claim_that_is_not_to_queue_does_not_wait(store).await;
    if !store.guarantees().fifo {
        return;
    }
    let name = fresh("line");
    let holder = claim(&name, TTL);
    let held = Held::new(&holder, &granted(store, &holder).await);
    let waiters: Vec<Claim> = (0..5).map(|_| claim(&name, TTL).with_queue(true)).collect();
    for (place, waiter) in waiters.iter().enumerate() {
        // Twice: presenting again keeps the place.
        for _ in 0..2 {
            match store.acquire(waiter).await {
                Ok(Acquired::Queued(ticket)) => {
                    assert_eq!(ticket.ahead(), Some(place as u64));
                    assert_eq!(ticket.holder().and_then(|holder| holder.id), Some(holder.id));
                }
                other => panic!("it should stand in line: {other:?}"),
            }
        }
    }
    let view = view(store, &name).await;
    assert_eq!((view.waiters, view.queue.len()), (5, 5));
    assert!(view.queue.iter().map(|waiter| waiter.id).eq(waiters.iter().map(|waiter| waiter.id)));
    let full = store.acquire(&claim(&name, TTL).with_queue(true).with_queue_limit(5)).await;
    assert!(matches!(&full, Err(error) if error.kind() == ErrorKind::QueueFull), "{full:?}");
    // One in the middle goes; the others keep their order.
    released(store, &Held::queued(&waiters[2], 0)).await;
    assert_eq!(released(store, &held).await, Released::Released);
    let mut last = held.token;
    for waiter in [0, 1, 3, 4].map(|number| &waiters[number]) {
        refused(store, &claim(&name, TTL)).await;
        let grant = handed(store, waiter).await;
        assert!(Some(grant.token) > last, "tokens grow along the line");
        last = Some(grant.token);
        assert_eq!(released(store, &Held::new(waiter, &grant)).await, Released::Released);
    }
    let next = claim(&name, TTL);
    let _ = granted(store, &next).await;
    an_owner_is_found_where_it_waits(store).await;
}

/// What deadlock detection goes by: where an owner waits, since when, and behind whose hold.
async fn an_owner_is_found_where_it_waits(store: &dyn Store) {
    let owned = |name: &Name, owner: &str| {
        let record = Record { owner: Some(owner.into()), ..Record::default() };
        claim(name, TTL).with_queue(true).with_record(record.encode().into())
    };
    let own = |view: &LockView, owner: &str| -> Vec<Waiter> {
        let of = |waiter: &Waiter| waiter.record.as_ref().and_then(|record| record.owner.clone());
        view.queue.iter().filter(|waiter| of(waiter).as_deref() == Some(owner)).cloned().collect()
    };
    let names = [fresh("waits"), fresh("waits")];
    let [holder, other, owner] = ["holder", "other", "owner"].map(|who| format!("{who} {}", names[0]));
    let mut waiters = Vec::new();
    for name in &names {
        let held = owned(name, &holder);
        let token = granted(store, &held).await.token;
        let line = [owned(name, &other), owned(name, &owner)];
        for (claim, owner) in line.iter().zip([&other, &owner]) {
            let answer = store.acquire(claim).await.expect("answered");
            let Acquired::Queued(ticket) = answer else { panic!("it should stand in line: {answer:?}") };
            store.announce(&ticket, owner).await.expect("announced");
        }
        waiters.push((held.id, token, line));
    }
    for _ in 0..2 {
        let views = store.inspect(&Query::Waits { owner: owner.clone() }).await.expect("answered").items;
        assert_eq!(views.len(), 2, "{views:?}");
        for view in views {
            let at = names.iter().position(|name| *name == view.name).expect("one of ours");
            let (id, token, [_, waiter]) = &waiters[at];
            let found = own(&view, &owner);
            let [found] = &found[..] else { panic!("{view:?}") };
            assert_eq!(found.id, waiter.id);
            assert!(found.since_unix_micros.is_some(), "it is told who joined last");
            // The whole line tells the same as this part of it.
            let line = self::view(store, &view.name).await.queue;
            assert_eq!(line[1], *found);
            assert!(line[0].since_unix_micros <= found.since_unix_micros);
            let holder_is = view.holder.expect("held");
            assert_eq!((holder_is.id, holder_is.token), (Some(*id), Some(*token)));
            assert_eq!(holder_is.record.and_then(|record| record.owner).as_ref(), Some(&holder));
        }
    }
    released(store, &Held::queued(&waiters[0].2[1], 0)).await;
    let views = store.inspect(&Query::Waits { owner: owner.clone() }).await.expect("answered").items;
    let waits: Vec<_> = views.iter().filter(|view| !own(view, &owner).is_empty()).collect();
    assert!(matches!(waits[..], [view] if view.name == names[1]), "it has left the other line: {views:?}");
    let none = store.inspect(&Query::Waits { owner: holder }).await.expect("answered").items;
    assert!(none.is_empty(), "holding is not waiting");
}

/// A grant that takes several tokens leaves them to no other.
async fn tokens_in_a_block(store: &dyn Store) {
    let name = fresh("block");
    let mine = claim(&name, TTL).with_tokens(10);
    let grant = granted(store, &mine).await;
    let next = claim(&name, TTL).with_queue(true).with_tokens(3);
    refused(store, &next).await;
    released(store, &Held::new(&mine, &grant)).await;
    let second = handed(store, &next).await;
    assert!(second.token.get() >= grant.token.get() + 10, "{} after ten from {}", second.token, grant.token);
    released(store, &Held::new(&next, &second)).await;
    let last = granted(store, &claim(&name, TTL)).await;
    assert!(last.token.get() >= second.token.get() + 3, "{} after three from {}", last.token, second.token);
}

/// Waits as a waiter does until `claim` has the lock.
async fn handed(store: &dyn Store, claim: &Claim) -> Grant {
    let latest = clock::now().plus(GRACE);
    loop {
        match store.acquire(claim).await.expect("an acquire is answered") {
            Acquired::Granted(grant) => return grant,
            Acquired::Queued(ticket) => match clock::timeout_at(latest, store.woken(&ticket)).await {
                Some(Woken::Granted { grant, .. }) => return grant,
                Some(_) => {}
                None => panic!("{} was handed to nobody", claim.name),
            },
            Acquired::Busy(_) if clock::now() < latest => clock::sleep(Duration::from_millis(2)).await,
            Acquired::Busy(holder) => panic!("{} is held by {holder}", claim.name),
        }
    }
}

/// Clause 9: an acquire dropped at any await, and then released as suspect, leaves neither a hold nor a place in a queue;
/// so does one that waited in line and was only released.
pub async fn a_cancelled_acquire_leaves_nothing(store: &dyn Store) {
    for polls in 1..=24 {
        let name = fresh("cancelled");
        let mine = claim(&name, TTL);
        let finished = poll_so_often(store.acquire(&mine), polls).await;
        released(store, &Held::unanswered(&mine)).await;
        let next = claim(&name, TTL).with_queue(true);
        let held = Held::new(&next, &granted(store, &next).await);

        let waiting = claim(&name, TTL).with_queue(true);
        let lined_up = async {
            if let Ok(Acquired::Queued(ticket)) = store.acquire(&waiting).await {
                let _ = store.woken(&ticket).await;
            }
        };
        // Once it is in line nothing need wake it for a long time: it is given up while the lock is still held.
        let lined_up = clock::timeout_at(clock::now().plus(MOMENT), lined_up);
        poll_so_often(lined_up, polls).await;
        assert_eq!(released(store, &Held::unanswered(&waiting)).await, Released::HeldByOther);
        let patient = claim(&name, TTL).with_queue(true);
        if let Ok(Acquired::Queued(ticket)) = store.acquire(&patient).await {
            assert_eq!(ticket.ahead().unwrap_or(0), 0, "somebody who had gone is still in line");
            let gone = Held::queued(&patient, ticket.session);
            assert_eq!(released(store, &gone).await, Released::HeldByOther);
        }
        assert_eq!(view(store, &name).await.waiters, 0);

        assert_eq!(released(store, &held).await, Released::Released);
        assert!(view(store, &name).await.holder.is_none(), "it was handed to one who had gone");
        let next = claim(&name, TTL);
        let grant = granted(store, &next).await;
        assert_eq!(released(store, &Held::new(&next, &grant)).await, Released::Released);
        if finished {
            return;
        }
    }
}

async fn view(store: &dyn Store, name: &Name) -> LockView {
    store.inspect(&Query::One(name.clone())).await.expect("answered").items.remove(0)
}

/// Polls `work` so often, each time when it asked to be polled, then drops it; true if it was done by then.
async fn poll_so_often<T>(work: impl Future<Output = T>, polls: usize) -> bool {
    let mut work = Box::pin(work);
    let mut left = polls;
    std::future::poll_fn(|cx: &mut Context<'_>| {
        left -= 1;
        match work.as_mut().poll(cx) {
            Poll::Ready(_) => Poll::Ready(true),
            Poll::Pending if left == 0 => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Clause 10: a request that arrives after its claim was released as suspect creates nothing: neither a hold nor a place
/// in line.
pub async fn a_late_request_creates_nothing(store: &dyn Store) {
    for queue in [false, true] {
        let name = fresh("late");
        let mine = claim(&name, TTL).with_queue(queue);
        assert_eq!(released(store, &Held::unanswered(&mine)).await, Released::NotHeld);
        let other = claim(&name, TTL);
        let held = Held::new(&other, &granted(store, &other).await);
        match store.acquire(&mine).await {
            Ok(Acquired::Busy(_)) | Err(_) => {}
            queued => panic!("a withdrawn claim was put in line: {queued:?}"),
        }
        assert_eq!(released(store, &held).await, Released::Released);
        for _ in 0..2 {
            let late = store.acquire(&mine).await;
            let refused = matches!(&late, Err(error) if error.kind() == ErrorKind::Rejected);
            assert!(refused, "a withdrawn claim was granted: {late:?}");
        }
        let next = claim(&name, TTL);
        let grant = granted(store, &next).await;
        assert_eq!(renewed(store, &Held::unanswered(&mine)).await, Renewal::Lost);
        assert_eq!(released(store, &Held::new(&next, &grant)).await, Released::Released);
    }
}

/// Clause 11: names never collide.
pub async fn names_never_collide(store: &dyn Store) {
    let run = fresh("names").to_string();
    let long = "x".repeat(MAX_NAME_BYTES - run.len() - 3);
    let mut names: Vec<Vec<u8>> = [
        "a", "A", "а", "a ", " a", "a/b", "a/", "a//b", "a:b", "a.b", "a\\b", "á", "a\u{301}", "{a}", "{a}b",
        "b{a}", "{}a", "a{}", "a{", "a}", "}{", "{{a}}", "a\n", "a\0", "a\0b", "*", "a*", "a?", "a%", "a_b",
        "'", "\"", "--",
    ]
    .iter()
    .map(|end| format!("{run}:{end}").into_bytes())
    .collect();
    names.extend([format!("{run}:{long}a"), format!("{run}:{long}b")].map(String::into_bytes));
    names.push([run.as_bytes(), &[b':', 0xff, 0xfe]].concat());
    names.push([run.as_bytes(), &[b':', 0xff, 0xff]].concat());
    let mut held = Vec::new();
    for name in &names {
        let name = Name::new(name).expect("it is valid");
        let mine = claim(&name, TTL);
        let grant = granted(store, &mine).await;
        refused(store, &claim(&name, TTL)).await;
        held.push(Held::new(&mine, &grant));
    }
    for answer in store.renew(&held).await {
        assert!(matches!(answer, Ok(Renewal::Renewed(_))), "{answer:?}");
    }
    for held in &held {
        let view = store.inspect(&Query::One(held.name.clone())).await.expect("answered").items.remove(0);
        assert_eq!(view.name, held.name);
        assert_eq!(view.holder.and_then(|holder| holder.id), Some(held.id));
        assert_eq!(released(store, held).await, Released::Released);
    }
}

/// Clause 12: the lease counts from before the request; a TTL out of bounds is refused before any I/O.
pub async fn leases_are_bounded_and_counted_from_before(store: &dyn Store) {
    let guarantees = store.guarantees();
    let name = fresh("bounds");
    let outside = [
        Duration::ZERO,
        guarantees.least_ttl.saturating_sub(Duration::from_millis(1)),
        guarantees.most_ttl + Duration::from_secs(1),
        Duration::MAX,
    ];
    for ttl in outside {
        let answer = store.acquire(&claim(&name, ttl)).await;
        let refused = matches!(&answer, Err(error) if error.kind() == ErrorKind::Invalid);
        assert!(refused, "a TTL of {ttl:?}: {answer:?}");
    }
    for ttl in [guarantees.most_ttl, Duration::from_secs(365 * 24 * 3600).min(guarantees.most_ttl), TTL] {
        let mine = claim(&name, ttl);
        let grant = granted(store, &mine).await;
        assert!(!grant.ttl.is_zero() && grant.ttl <= ttl, "{:?} granted of {ttl:?}", grant.ttl);
        assert_eq!(released(store, &Held::new(&mine, &grant)).await, Released::Released);
    }
    // Whatever is granted, it is not free before that much time has passed since before the request.
    let short = guarantees.least_ttl.max(Duration::from_millis(120));
    let sent = clock::now();
    let grant = granted(store, &claim(&name, short)).await;
    free_by(store, &name, free_again(&guarantees, short)).await;
    let held_for = clock::now().since(sent);
    assert!(held_for.saturating_add(crate::lease::drift(grant.ttl)) >= grant.ttl, "free after {held_for:?}");
}

/// Clause 13: a waiter that died, or a host that vanished with a hundred of them, delays the others by one lease at most.
pub async fn a_dead_waiter_delays_nobody_for_long(store: &dyn Store) {
    for dead in [1, 100] {
        let name = fresh("dead-waiter");
        let short = store.guarantees().least_ttl.max(Duration::from_millis(100));
        let holder = claim(&name, TTL);
        let grant = granted(store, &holder).await;
        for number in 0..dead {
            // It asks to wait, or is told that it is busy, and is never heard of again.
            let dead = claim(&name, short).with_queue(true);
            refused(store, &dead).await;
            if number == 0 {
                let mut forgotten = Box::pin(store.acquire(&dead));
                let _ = forgotten.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            }
        }
        released(store, &Held::new(&holder, &grant)).await;
        free_by(store, &name, free_again(&store.guarantees(), short * 2)).await;
    }
}
