//! What a waiter reads to find a deadlock: when, how much, and what becomes of it if the store errs, hangs or changes.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use leasehold::store::Store;
use leasehold::stores::memory::MemoryStore;
use leasehold::{
    Acquired, Claim, Error, ErrorKind, Finding, Guarantees, Held, LockView, Locks, Name, Owner, Page, Query,
    Record, Released, Renewal, Result, Ticket, Woken, clock,
};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// What is done before a look is answered; it is given how many came before.
type Before = Box<dyn FnMut(usize) -> Answer + Send>;

enum Answer {
    True,
    Fails,
    Hangs,
}

/// A memory store that notes the looks for deadlocks and lets a test come between them.
struct Watched {
    inner: Arc<MemoryStore>,
    notes: Mutex<Vec<String>>,
    before: Mutex<Before>,
}

impl Watched {
    fn with(before: impl FnMut(usize) -> Answer + Send + 'static) -> (Arc<MemoryStore>, Arc<Self>, Locks) {
        let inner = Arc::new(MemoryStore::new());
        let before: Mutex<Before> = Mutex::new(Box::new(before));
        let store = Arc::new(Self { inner: inner.clone(), notes: Mutex::default(), before });
        let locks = Locks::over(store.clone()).unwrap();
        (inner, store, locks)
    }

    fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap().clone()
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watched")
    }
}

#[async_trait::async_trait]
impl Store for Watched {
    async fn acquire(&self, claim: &Claim) -> Result<Acquired> {
        self.inner.acquire(claim).await
    }
    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.inner.woken(ticket).await
    }
    async fn announce(&self, ticket: &Ticket, owner: &str) -> Result<()> {
        self.notes.lock().unwrap().push(format!("{owner} announces {}", ticket.name));
        Ok(())
    }
    async fn renew(&self, held: &[Held]) -> Vec<Result<Renewal>> {
        self.inner.renew(held).await
    }
    async fn release(&self, held: &Held) -> Result<Released> {
        self.inner.release(held).await
    }
    async fn inspect(&self, query: &Query) -> Result<Page<LockView>> {
        if let Query::Waits { owner } = query {
            let answer = {
                let mut notes = self.notes.lock().unwrap();
                let looks = notes.iter().filter(|note| note.starts_with("look")).count();
                notes.push(format!("look at {owner}"));
                (self.before.lock().unwrap())(looks)
            };
            match answer {
                Answer::True => {}
                Answer::Fails => return Err(Error::new(ErrorKind::Unavailable, "not now")),
                Answer::Hangs => std::future::pending::<()>().await,
            }
        }
        self.inner.inspect(query).await
    }
    fn guarantees(&self) -> Guarantees {
        self.inner.guarantees()
    }
    fn location(&self) -> Arc<str> {
        self.inner.location()
    }
    async fn diagnose(&self) -> Vec<Finding> {
        self.inner.diagnose().await
    }
    fn lifeline(&self) -> Option<Arc<std::fs::File>> {
        None
    }
}

/// A claim that somebody else makes, in another process as it were.
fn claim(name: &str, owner: &str) -> Claim {
    let record = Record { owner: Some(owner.into()), host: "far".into(), pid: 7, ..Record::default() };
    Claim::new(Name::new(name).unwrap(), clock::claim_id(), Duration::from_secs(30))
        .with_queue(true)
        .with_record(record.encode().into())
}

/// Presents it; the memory store is ready at once.
fn present(store: &MemoryStore, claim: &Claim) -> Acquired {
    pollster::block_on(store.acquire(claim)).unwrap()
}

fn held(claim: &Claim) -> Held {
    Held::queued(claim, 0)
}

fn me() -> Owner {
    Owner::existing("me").unwrap()
}

/// `me` holds y and waits for x; the other holds x and waits for y. `change` is done between the two looks.
async fn told_although(
    change: impl FnOnce(&MemoryStore, &Claim, &Claim) + Send + 'static,
) -> (Arc<Watched>, Result<bool>) {
    let (x, wait) = (claim("x", "other"), claim("y", "other"));
    let meanwhile = Arc::new(Mutex::new(None::<Box<dyn FnOnce() + Send>>));
    let job = meanwhile.clone();
    let (inner, store, locks) = Watched::with(move |looks| {
        // Two owners are read in the first look.
        if looks == 2
            && let Some(job) = job.lock().unwrap().take()
        {
            job();
        }
        Answer::True
    });
    assert!(matches!(present(&inner, &x), Acquired::Granted(_)));
    let _y = locks.mutex("y").owner(&me()).lock().await.unwrap();
    assert!(matches!(present(&inner, &wait), Acquired::Queued(_)));
    let again = claim("x", "other");
    assert!(matches!(present(&inner, &again), Acquired::Queued(_)));
    *meanwhile.lock().unwrap() = Some(Box::new(move || change(&inner, &x, &wait)));
    let got = locks.mutex("x").owner(&me()).deadlock_after(ms(50)).lock_for(ms(1500)).await;
    assert!(meanwhile.lock().unwrap().is_none(), "there was a second look");
    (store, got.map(|guard| guard.is_some()))
}

#[tokio::test]
async fn a_circle_is_reported_if_it_is_the_same_at_the_second_look() {
    let (store, got) = told_although(|_, _, _| {}).await;
    let error = got.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadlock);
    assert!(error.to_string().contains("other holds x"), "{error}");
    assert!(error.to_string().contains(", far:7) and waits for y; me was the last"), "{error}");
    let looks = ["me announces x", "look at me", "look at other", "look at me", "look at other"];
    assert_eq!(store.notes(), looks);
}

#[tokio::test]
async fn a_circle_that_dissolves_between_the_looks_is_none() {
    // It gives up waiting for y.
    let (_, got) = told_although(|store, _, wait| {
        pollster::block_on(store.release(&held(wait))).unwrap();
    })
    .await;
    assert!(!got.unwrap(), "the time is up, no more");
}

#[tokio::test]
async fn the_same_owners_with_another_wait_or_hold_are_not_the_same_circle() {
    let (_, got) = told_although(|store, _, wait| {
        pollster::block_on(store.release(&held(wait))).unwrap();
        assert!(matches!(present(store, &claim("y", "other")), Acquired::Queued(_)));
    })
    .await;
    assert!(!got.unwrap(), "it waits for y anew");
    // It lets go of x, and its own next claim, which was first in line, has it: another claim, another token.
    let (_, got) = told_although(|store, x, _| {
        pollster::block_on(store.release(&held(x))).unwrap();
    })
    .await;
    assert!(!got.unwrap(), "it holds x anew");
}

#[tokio::test]
async fn a_look_that_fails_is_made_again_and_costs_no_place_in_line() {
    let (inner, store, locks) = Watched::with(|looks| if looks == 0 { Answer::Fails } else { Answer::True });
    let x = claim("x", "other");
    assert!(matches!(present(&inner, &x), Acquired::Granted(_)));
    let _y = locks.mutex("y").owner(&me()).lock().await.unwrap();
    assert!(matches!(present(&inner, &claim("y", "other")), Acquired::Queued(_)));
    let began = clock::now();
    let error = locks.mutex("x").owner(&me()).deadlock_after(ms(50)).lock().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadlock);
    let after = clock::now().since(began);
    assert!(after > ms(2900) && after < ms(6000), "{after:?}: three seconds later");
    let announced = store.notes().iter().filter(|note| note.contains("announces")).count();
    assert_eq!(announced, 2, "before each look");
}

#[tokio::test]
async fn a_look_that_hangs_holds_up_no_grant() {
    let (_inner, store, locks) = Watched::with(|_| Answer::Hangs);
    let guard = locks.mutex("x").owner(&Owner::new("other")).lock().await.unwrap();
    let mutex = locks.mutex("x").owner(&me()).deadlock_after(ms(10));
    let waiter = tokio::spawn(async move { mutex.lock().await });
    while store.notes().len() < 2 {
        clock::sleep(ms(2)).await;
    }
    guard.unlock().await.unwrap();
    let got = clock::timeout_at(clock::now().plus(Duration::from_secs(5)), waiter).await;
    drop(got.expect("it is handed over at once").unwrap().unwrap());
}

#[tokio::test]
async fn a_wait_without_an_owner_or_shorter_than_asked_reads_nothing() {
    let (_inner, store, locks) = Watched::with(|_| Answer::True);
    let _guard = locks.mutex("x").owner(&me()).lock().await.unwrap();
    let other = Owner::new("other");
    let mutex = locks.mutex("x");
    assert!(mutex.clone().deadlock_after(ms(1)).lock_for(ms(200)).await.unwrap().is_none());
    assert!(mutex.clone().owner(&other).lock_for(ms(500)).await.unwrap().is_none());
    assert!(mutex.clone().owner(&me()).deadlock_after(ms(1)).try_lock().await.unwrap().is_none());
    assert_eq!(store.notes(), [""; 0]);
    assert!(mutex.owner(&other).deadlock_after(ms(20)).lock_for(ms(500)).await.unwrap().is_none());
    assert_eq!(store.notes().len(), 3, "{:?}: announced, and two owners read, once", store.notes());
}

/// A ring of `others` owners and of `me`, who closes it: how many owners are read, and what `me` is told.
async fn ring(others: usize) -> (usize, Option<Error>) {
    let (inner, store, locks) = Watched::with(|_| Answer::True);
    let _first = locks.mutex("l0").owner(&me()).lock().await.unwrap();
    for n in 1..=others {
        assert!(matches!(present(&inner, &claim(&format!("l{n}"), &format!("o{n}"))), Acquired::Granted(_)));
    }
    for n in 1..=others {
        let next = format!("l{}", (n + 1) % (others + 1));
        assert!(matches!(present(&inner, &claim(&next, &format!("o{n}"))), Acquired::Queued(_)));
    }
    let got = locks.mutex("l1").owner(&me()).deadlock_after(ms(20)).lock_for(ms(1000)).await;
    (store.notes().len() - 1, got.err())
}

#[tokio::test]
async fn a_walk_ends_after_sixty_four_owners() {
    let (reads, error) = ring(64).await;
    let text = error.expect("a circle within the bound").to_string();
    assert_eq!(reads, 2 * 65, "each read once in each look");
    for n in 1..=64 {
        assert!(text.contains(&format!("o{n} holds l{n} (")), "o{n} is not in {text}");
    }
    let (reads, error) = ring(65).await;
    assert_eq!((reads, error.map(|error| error.to_string())), (65, None));
}

#[tokio::test]
async fn an_owner_that_waits_twice_is_in_every_circle_that_either_wait_makes() {
    let (inner, _store, locks) = Watched::with(|_| Answer::True);
    let _y = locks.mutex("y").owner(&me()).lock().await.unwrap();
    for held in [claim("x", "other"), claim("z", "third")] {
        assert!(matches!(present(&inner, &held), Acquired::Granted(_)));
    }
    for wait in [claim("z", "other"), claim("y", "other")] {
        assert!(matches!(present(&inner, &wait), Acquired::Queued(_)));
    }
    let error = locks.mutex("x").owner(&me()).deadlock_after(ms(20)).lock().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadlock);
}
