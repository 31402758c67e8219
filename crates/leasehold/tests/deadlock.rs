//! Owners that wait for each other: one of them is told, the others go on, and nobody is told without need.
//!
//! The suite is written over `Locks`: a store joins with one line below.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use leasehold::store::Store;
use leasehold::stores::memory::MemoryStore;
use leasehold::{
    Acquired, Claim, Error, ErrorKind, Finding, Guarantees, Guard, Held, LockView, Locks, Owner, Page, Query,
    Released, Renewal, Ticket, Woken, clock,
};
use leasehold_chaos::servers::RedisServer;
use tokio::task::JoinHandle;

/// Every case on one store: `$make` gives what must live as long, and two handles as of two processes.
macro_rules! suite {
    ($store:ident, $make:expr) => {
        suite! { @each $store, $make;
            the_last_of_two_to_wait_is_told_the_whole_circle
            a_ring_of_three_loses_its_last_comer_only
            without_an_owner_there_is_no_alarm
            who_waits_for_itself_is_told
            an_owner_is_the_same_in_every_process
            one_who_never_looks_is_never_told
            a_line_behind_a_circle_is_not_told
            random_orders_of_locks_meet_true_circles_only
            one_order_of_locks_meets_none
        }
    };
    (@each $store:ident, $make:expr; $($case:ident)*) => {
        mod $store {
            use super::*;

            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let (_server, locks) = $make.await;
                super::$case(&locks).await;
            })*
        }
    };
}

suite!(memory, memory());
suite!(redis, redis());
suite!(sqlite, sqlite());

async fn redis() -> (RedisServer, [Locks; 2]) {
    let server = RedisServer::start();
    let locks = two(&server.url()).await;
    (server, locks)
}

async fn sqlite() -> (tempfile::TempDir, [Locks; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let locks = two(&format!("sqlite:{}", folder.path().join("locks.db").display())).await;
    (folder, locks)
}

/// Two handles on a real store, each with a connection of its own.
async fn two(url: &str) -> [Locks; 2] {
    [leasehold::connect(url).await.unwrap(), leasehold::connect(url).await.unwrap()]
}

#[expect(clippy::unused_async, reason = "every store is made in the same way")]
async fn memory() -> ((), [Locks; 2]) {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    ((), over(&store))
}

/// Two handles, as of two processes, on a store that is some way off.
fn over(store: &Arc<dyn Store>) -> [Locks; 2] {
    [(); 2].map(|()| Locks::over(Arc::new(Distant(store.clone()))).unwrap())
}

/// Looks take some time, and what is released or given up is so a little later: what a walk finds is seldom true.
#[derive(Debug)]
struct Distant(Arc<dyn Store>);

#[async_trait::async_trait]
impl Store for Distant {
    async fn acquire(&self, claim: &Claim) -> leasehold::Result<Acquired> {
        self.0.acquire(claim).await
    }
    async fn woken(&self, ticket: &Ticket) -> Woken {
        self.0.woken(ticket).await
    }
    async fn announce(&self, ticket: &Ticket, owner: &str) -> leasehold::Result<()> {
        self.0.announce(ticket, owner).await
    }
    async fn renew(&self, held: &[Held]) -> Vec<leasehold::Result<Renewal>> {
        self.0.renew(held).await
    }
    async fn release(&self, held: &Held) -> leasehold::Result<Released> {
        clock::sleep(clock::jitter(ms(20))).await;
        self.0.release(held).await
    }
    async fn inspect(&self, query: &Query) -> leasehold::Result<Page<LockView>> {
        clock::sleep(clock::jitter(ms(4))).await;
        self.0.inspect(query).await
    }
    fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }
    fn location(&self) -> Arc<str> {
        self.0.location()
    }
    async fn diagnose(&self) -> Vec<Finding> {
        self.0.diagnose().await
    }
    fn lifeline(&self) -> Option<Arc<std::fs::File>> {
        self.0.lifeline()
    }
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    let latest = clock::now().plus(Duration::from_secs(20));
    clock::timeout_at(latest, work).await.unwrap_or_else(|| panic!("did not come about: {what}"))
}

/// Locks `name` for `owner` in a task of its own, once so many wait there already; returns when it stands in line.
async fn wait_for(
    locks: &Locks,
    name: &str,
    owner: &Owner,
    after: Duration,
) -> JoinHandle<leasehold::Result<Guard>> {
    let before = locks.show(name).await.unwrap().waiters;
    let mutex = locks.mutex(name).owner(owner).deadlock_after(after);
    let task = tokio::spawn(async move { mutex.lock().await });
    in_time("it stands in line", async {
        while locks.show(name).await.unwrap().waiters == before {
            clock::sleep(ms(2)).await;
        }
    })
    .await;
    task
}

async fn told(waiter: JoinHandle<leasehold::Result<Guard>>) -> Error {
    let error = in_time("somebody is told", waiter).await.unwrap().expect_err("nobody can have it");
    assert_eq!(error.kind(), ErrorKind::Deadlock, "{error}");
    error
}

async fn the_last_of_two_to_wait_is_told_the_whole_circle(locks: &[Locks; 2]) {
    // Both ways round, so that the rule and not the order of the owners decides.
    for (n, first) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
        let names = [format!("a\n{n}"), format!("b\n{n}")];
        let owners = [Owner::new("left\x1b"), Owner::new("right\x1b")];
        let mut guards = Vec::new();
        for at in [0, 1] {
            let mutex = locks[at].mutex(&names[at]).owner(&owners[at]).label(format!("why\n{at}"));
            guards.push(Some(mutex.lock().await.unwrap()));
        }
        let last = 1 - first;
        // The one that goes on looks first, when the circle is there already: it is not its turn to be told.
        let goes_on = wait_for(&locks[first], &names[last], &owners[first], ms(100)).await;
        let gives_way = wait_for(&locks[last], &names[first], &owners[last], ms(500)).await;
        let error = told(gives_way).await;
        assert_eq!(error.name().unwrap().as_bytes(), names[first].as_bytes());
        let text = error.to_string();
        for at in [0, 1] {
            let guard = guards[at].as_ref().unwrap();
            let holds = format!(
                "{} holds {} (token {}, {}:{} \"why\\u{{a}}{at}\") and waits for {}",
                owners[at],
                guard.name(),
                guard.fencing_token(),
                rustix::system::uname().nodename().to_string_lossy(),
                std::process::id(),
                guards[1 - at].as_ref().unwrap().name(),
            );
            assert!(text.contains(&holds), "{holds}\nis not in\n{text}");
        }
        assert!(text.contains(&format!("{} was the last to wait", owners[last])), "{text}");
        assert!(!text.contains(['\n', '\x1b']), "{text:?}");
        assert!(error.advice().unwrap().contains("one order"), "{text}");
        assert!(!goes_on.is_finished());
        in_time("its claim is withdrawn", async {
            while locks[0].show(&names[first]).await.unwrap().waiters > 0 {
                clock::sleep(ms(2)).await;
            }
        })
        .await;
        guards[last].take().unwrap().unlock().await.unwrap();
        drop(in_time("the other gets its lock", goes_on).await.unwrap().unwrap());
    }
}

async fn a_ring_of_three_loses_its_last_comer_only(locks: &[Locks; 2]) {
    for last in 0..3 {
        let names: Vec<_> = (0..3).map(|at| format!("ring {last} {at}")).collect();
        let owners: Vec<_> = (0..3).map(|at| Owner::new(format!("member {at}"))).collect();
        let mut guards = Vec::new();
        for at in 0..3 {
            guards.push(Some(locks[at % 2].mutex(&names[at]).owner(&owners[at]).lock().await.unwrap()));
        }
        let mut waiters: Vec<_> = (0..3).map(|_| None).collect();
        for step in 1..=3 {
            let at = (last + step) % 3;
            waiters[at] = Some(wait_for(&locks[at % 2], &names[(at + 1) % 3], &owners[at], ms(60)).await);
        }
        let error = told(waiters[last].take().unwrap()).await;
        for owner in &owners {
            assert_eq!(error.to_string().matches(&format!("{owner} holds")).count(), 1, "{error}");
        }
        // What it gives back lets one after the other go on.
        guards[last].take();
        for step in [2, 1] {
            let at = (last + step) % 3;
            let guard = in_time("the others go on", waiters[at].take().unwrap()).await.unwrap();
            drop((guard.unwrap(), guards[at].take()));
        }
    }
}

async fn without_an_owner_there_is_no_alarm(locks: &[Locks; 2]) {
    let owner = Owner::new("the only one");
    for named in [&[][..], &[0][..], &[1][..]] {
        let mutexes: Vec<_> = (0..4)
            .map(|at| {
                let mutex = locks[at % 2].mutex(["x", "y"][usize::from((1..3).contains(&at))]);
                let mutex = mutex.deadlock_after(ms(1));
                if named.contains(&(at % 2)) { mutex.owner(&owner) } else { mutex }
            })
            .collect();
        let held = (mutexes[0].lock().await.unwrap(), mutexes[1].lock().await.unwrap());
        let (one, other) = tokio::join!(mutexes[2].lock_for(ms(500)), mutexes[3].lock_for(ms(500)));
        assert!(one.unwrap().is_none() && other.unwrap().is_none());
        held.0.unlock().await.unwrap();
        held.1.unlock().await.unwrap();
    }
}

async fn who_waits_for_itself_is_told(locks: &[Locks; 2]) {
    let owner = Owner::new("absent-minded");
    let mutex = locks[0].mutex("twice").owner(&owner);
    let guard = mutex.lock().await.unwrap();
    let began = clock::now();
    let error = in_time("it is told", mutex.lock()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadlock);
    let text = error.to_string();
    let token = guard.fencing_token();
    assert!(text.contains(&format!("{owner} holds twice (token {token}, ")), "{text}");
    assert!(text.contains(&format!("and waits for twice; {owner} waits for itself")), "{text}");
    let after = clock::now().since(began);
    assert!(
        after >= Duration::from_secs(1) && after < Duration::from_secs(3),
        "{after:?}: not at the first look"
    );
    assert!(mutex.try_lock().await.unwrap().is_none(), "not waiting is no deadlock");
}

async fn an_owner_is_the_same_in_every_process(locks: &[Locks; 2]) {
    let (one, other) = (Owner::new("one"), Owner::new("other"));
    let _x = locks[0].mutex("x").owner(&one).lock().await.unwrap();
    let y = locks[0].mutex("y").owner(&other).lock().await.unwrap();
    let goes_on = wait_for(&locks[1], "y", &Owner::existing(&one.to_string()).unwrap(), ms(60)).await;
    told(wait_for(&locks[1], "x", &Owner::existing(other.as_str()).unwrap(), ms(60)).await).await;
    drop(y);
    drop(in_time("the other goes on", goes_on).await.unwrap().unwrap());
}

async fn one_who_never_looks_is_never_told(locks: &[Locks; 2]) {
    let (one, other) = (Owner::new("one"), Owner::new("other"));
    let _x = locks[0].mutex("x").owner(&one).lock().await.unwrap();
    let _y = locks[1].mutex("y").owner(&other).lock().await.unwrap();
    let first = wait_for(&locks[0], "y", &one, ms(20)).await;
    let last = locks[1].mutex("x").owner(&other).deadlock_after(Duration::MAX);
    assert!(last.lock_for(ms(1500)).await.unwrap().is_none());
    assert!(!first.is_finished(), "only the last to wait may be told");
    first.abort();
}

async fn a_line_behind_a_circle_is_not_told(locks: &[Locks; 2]) {
    let owners: Vec<_> = (0..3).map(|at| Owner::new(format!("{at}"))).collect();
    let _x = locks[0].mutex("x").owner(&owners[0]).lock().await.unwrap();
    let y = locks[1].mutex("y").owner(&owners[1]).lock().await.unwrap();
    let first = wait_for(&locks[0], "y", &owners[0], ms(20)).await;
    // The last to wait, and looking all the time: but nobody waits for it.
    let last = wait_for(&locks[1], "x", &owners[1], ms(600)).await;
    let onlooker = wait_for(&locks[0], "x", &owners[2], ms(20)).await;
    told(last).await;
    assert!(!onlooker.is_finished());
    drop(y);
    drop(in_time("the first goes on", first).await.unwrap().unwrap());
    onlooker.abort();
}

/// Who holds and waits for what, as the workers themselves know it: what is in it is true for sure.
#[derive(Default)]
struct Reference {
    holder: HashMap<usize, String>,
    waits: BTreeMap<String, usize>,
    /// The members of every circle that there has been and nobody was told of.
    circles: Vec<Vec<String>>,
}

impl Reference {
    /// Every member of a circle held what it holds before it began to wait: the last of the waits closes it.
    fn waits(&mut self, owner: &str, lock: usize) {
        self.waits.insert(owner.to_owned(), lock);
        self.circles.extend(self.circle(owner));
    }

    /// How large the circle is that an error tells of: there must have been just that one, and no other member was told
    /// of it. (That it is there still cannot be asked for: one of the others may have given up in this moment.)
    fn told(&mut self, owner: &str, error: &Error) -> usize {
        let text = error.to_string();
        let is_told = |circle: &Vec<String>| {
            circle.iter().any(|member| member == owner)
                && circle.iter().all(|member| text.contains(&format!("{member} holds ")))
                && circle.len() == text.matches(" (token ").count()
        };
        let at = self.circles.iter().position(is_told).unwrap_or_else(|| panic!("a false alarm: {text}"));
        self.circles.swap_remove(at).len()
    }

    /// The owners on the way from `owner` back to itself.
    fn circle(&self, owner: &str) -> Option<Vec<String>> {
        let (mut at, mut way) = (owner.to_owned(), Vec::new());
        while way.len() <= self.waits.len() {
            way.push(at.clone());
            at.clone_from(self.holder.get(self.waits.get(&at)?)?);
            if at == owner {
                return Some(way);
            }
        }
        None
    }
}

struct Churn {
    reference: Mutex<Reference>,
    alarms: AtomicU64,
    units: AtomicU64,
    longest_circle: AtomicU64,
    random: bool,
}

const LOCKS: usize = 6;

impl Churn {
    fn reference(&self) -> std::sync::MutexGuard<'_, Reference> {
        self.reference.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn choose(&self) -> Vec<usize> {
        let mut all: Vec<usize> = (0..LOCKS).collect();
        fastrand::shuffle(&mut all);
        all.truncate(fastrand::usize(2..=3));
        if !self.random {
            all.sort_unstable();
        }
        all
    }

    /// The answer to a wait, once it has been compared with what is true.
    fn settled(
        &self,
        owner: &Owner,
        lock: usize,
        got: leasehold::Result<Option<Guard>>,
    ) -> Result<Guard, ErrorKind> {
        let got = match got {
            // A patience shorter than a slow store's first answer.
            Err(error) if error.kind() == ErrorKind::Unknown => Ok(None),
            got => got,
        };
        let mut reference = self.reference();
        if let Err(error) = &got {
            assert_eq!(error.kind(), ErrorKind::Deadlock, "{error}");
            let members = reference.told(owner.as_str(), error) as u64;
            self.alarms.fetch_add(1, Ordering::Relaxed);
            self.longest_circle.fetch_max(members, Ordering::Relaxed);
        }
        reference.waits.remove(owner.as_str());
        let guard = got.map_err(|error| error.kind())?.ok_or(ErrorKind::Busy)?;
        reference.holder.insert(lock, owner.to_string());
        Ok(guard)
    }

    /// One unit of work: its locks one after the other, then all of them back.
    async fn unit(&self, locks: &Locks) {
        let owner = Owner::new("unit");
        let mut guards = Vec::new();
        for lock in self.choose() {
            self.reference().waits(owner.as_str(), lock);
            let mutex = locks.mutex(format!("lock {lock}")).owner(&owner).deadlock_after(ms(2));
            // (Looks come sooner than releases here, so that the second look has something to do.)
            // Some give up by themselves: their places in line stay for a moment.
            let patience =
                if fastrand::u8(..8) == 0 { clock::jitter(ms(200)) + ms(1) } else { Duration::MAX };
            let got = in_time("the lock, or an alarm", mutex.lock_for(patience)).await;
            match self.settled(&owner, lock, got) {
                Ok(guard) => guards.push((lock, guard)),
                // A unit that could not have its lock goes on without it, or lets go of everything.
                Err(ErrorKind::Busy) if fastrand::bool() => {}
                Err(_) => break,
            }
            if fastrand::u8(..4) == 0 {
                clock::sleep(clock::jitter(ms(5))).await;
            }
            // Some go on without what they had: the release is under way while they wait for the next.
            if fastrand::u8(..3) == 0
                && let Some((lock, guard)) = guards.pop()
            {
                self.reference().holder.remove(&lock);
                drop(guard);
            }
        }
        fastrand::shuffle(&mut guards);
        for (lock, guard) in guards {
            self.reference().holder.remove(&lock);
            if fastrand::bool() {
                guard.unlock().await.unwrap();
            }
        }
        self.units.fetch_add(1, Ordering::Relaxed);
    }
}

/// `LEASEHOLD_CHURN_SECONDS` makes it long.
async fn churn(locks: &[Locks; 2], random: bool, seconds: u64) -> Arc<Churn> {
    let seconds = std::env::var("LEASEHOLD_CHURN_SECONDS").map_or(seconds, |text| text.parse().unwrap());
    let churn = Arc::new(Churn {
        reference: Mutex::default(),
        alarms: AtomicU64::new(0),
        units: AtomicU64::new(0),
        longest_circle: AtomicU64::new(0),
        random,
    });
    let end = clock::now().plus(Duration::from_secs(seconds));
    let workers: Vec<_> = (0..12)
        .map(|n| {
            let (churn, locks) = (churn.clone(), locks[n % 2].clone());
            tokio::spawn(async move {
                while clock::now() < end {
                    churn.unit(&locks).await;
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
    eprintln!(
        "random order {random}: {} units of work, {} alarms, longest circle {}",
        count(&churn.units),
        count(&churn.alarms),
        count(&churn.longest_circle)
    );
    assert!(count(&churn.units) > 50);
    churn
}

async fn random_orders_of_locks_meet_true_circles_only(locks: &[Locks; 2]) {
    let churn = churn(locks, true, 10).await;
    assert!(churn.alarms.load(Ordering::Relaxed) > 5, "too few circles to say anything");
}

async fn one_order_of_locks_meets_none(locks: &[Locks; 2]) {
    let churn = churn(locks, false, 5).await;
    assert_eq!(churn.alarms.load(Ordering::Relaxed), 0);
}
