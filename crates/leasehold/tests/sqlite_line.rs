//! The line of waiters of the embedded store, over processes: in order, woken without polling, with killed and stopped
//! processes in it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use leasehold::clock;
use leasehold::store::{HAND_OFF_TTL, Store, Woken};
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold::{
    Acquired, Claim, Grant, Held, LockView, Locks, Name, Query, Released, Renewal, Status, Ticket,
};
use pollster::block_on;
use rustix::process::Signal;
use tempfile::TempDir;

mod processes;
use processes::{PATIENCE, Process, say};

const LONG: Duration = Duration::from_secs(3600);
/// Long enough that the first look around after joining the line is over: what comes then is found by a ring or by the
/// slow rounds only.
const SETTLED: Duration = Duration::from_millis(300);
/// Less than the rounds of waiters with a long TTL are apart, and far more than a wake-up takes.
const SOON: Duration = Duration::from_secs(2);

fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("locks.db");
    (folder, path)
}

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, &Options::default()).unwrap()
}

fn claim(ttl: Duration) -> Claim {
    Claim::new(Name::new("a").unwrap(), clock::claim_id(), ttl).with_queue(true)
}

#[track_caller]
fn take(store: &SqliteStore) -> Held {
    let claim = claim(LONG).with_queue(false);
    match block_on(store.acquire(&claim)).unwrap() {
        Acquired::Granted(grant) => Held::new(&claim, &grant),
        other => panic!("not granted: {other:?}"),
    }
}

#[track_caller]
fn give_back(store: &SqliteStore, held: &Held) {
    assert_eq!(block_on(store.release(held)).unwrap(), Released::Released);
}

/// Presents the claim, which must have to wait.
#[track_caller]
fn ticket(store: &SqliteStore, claim: &Claim) -> Ticket {
    match block_on(store.acquire(claim)).unwrap() {
        Acquired::Queued(ticket) => ticket,
        other => panic!("not in line: {other:?}"),
    }
}

/// The same; says how many are ahead.
#[track_caller]
fn line_up(store: &SqliteStore, claim: &Claim) -> u64 {
    ticket(store, claim).ahead().unwrap()
}

/// Waits with a ticket, and then as long as it takes.
async fn wait_on(store: &SqliteStore, claim: &Claim, mut ticket: Ticket) -> Grant {
    loop {
        match store.woken(&ticket).await {
            Woken::Granted { grant, sent } if sent.boot.plus(grant.ttl) > clock::now() => return grant,
            Woken::Waiting(now) => ticket = now,
            _ => return wait(store, claim).await,
        }
    }
}

/// Stops a process, but not in the middle of a request: then it would stand in the gate.
fn freeze(process: &Process, path: &Path) {
    let gate = fs::File::open(format!("{}-gate", path.display())).unwrap();
    gate.lock().unwrap();
    process.signal(Signal::STOP);
    let tasks = format!("/proc/{}/task", process.child.id());
    let is_stopped = |task: PathBuf| fs::read_to_string(task.join("stat")).unwrap().contains(") T ");
    until(|| fs::read_dir(&tasks).unwrap().all(|task| is_stopped(task.unwrap().path())));
}

async fn wait(store: &SqliteStore, claim: &Claim) -> Grant {
    loop {
        match store.acquire(claim).await.unwrap() {
            Acquired::Granted(grant) => return grant,
            Acquired::Queued(ticket) => {
                if let Woken::Granted { grant, sent } = store.woken(&ticket).await
                    && sent.boot.plus(grant.ttl) > clock::now()
                {
                    return grant;
                }
            }
            other @ Acquired::Busy(_) => panic!("it is to queue: {other:?}"),
        }
    }
}

#[track_caller]
fn wait_for(store: &SqliteStore, claim: &Claim) -> Grant {
    let patient = clock::timeout_at(clock::now().plus(PATIENCE), wait(store, claim));
    block_on(patient).expect("it is never granted")
}

fn show(store: &SqliteStore) -> LockView {
    block_on(store.inspect(&Query::One(Name::new("a").unwrap()))).unwrap().items.remove(0)
}

/// Waits for an event that has no signal of its own.
#[track_caller]
fn until(mut done: impl FnMut() -> bool) {
    let start = clock::now();
    while !done() {
        assert!(clock::now().since(start) < PATIENCE, "it does not happen");
        block_on(clock::sleep(Duration::from_millis(5)));
    }
}

fn pause(span: Duration) {
    block_on(clock::sleep(span));
}

/// The bells beside the database.
fn bells(path: &Path) -> Vec<PathBuf> {
    let live = fs::read_dir(format!("{}-live", path.display())).unwrap();
    let files = live.map(|entry| entry.unwrap().path());
    files.filter(|file| file.extension().is_some_and(|end| end == "bell")).collect()
}

fn count(path: &Path, sql: &str) -> i64 {
    rusqlite::Connection::open(path).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
}

/// What the other processes do; in the test run itself there is no task and nothing to do.
#[test]
fn another_process() {
    let Ok(task) = std::env::var("LEASEHOLD_TEST_TASK") else { return };
    let path = PathBuf::from(std::env::var("LEASEHOLD_TEST_PATH").unwrap());
    let ttl = Duration::from_millis(std::env::var("LEASEHOLD_TEST_TTL_MS").unwrap().parse().unwrap());
    match task.as_str() {
        "hold" => {
            let store = open(&path);
            let claim = claim(ttl);
            let Acquired::Granted(grant) = block_on(store.acquire(&claim)).unwrap() else { panic!("busy") };
            say(&format!("held {}", grant.token));
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        "wait" => {
            let store = open(&path);
            let claim = claim(ttl);
            say(&format!("ahead {}", line_up(&store, &claim)));
            let grant = wait_for(&store, &claim);
            say(&format!("held {}", grant.token));
            give_back(&store, &Held::new(&claim, &grant));
        }
        "guard" => guard(&path, ttl),
        "hundred" => hundred(&path, ttl),
        other => panic!("{other}"),
    }
}

/// Takes the lock as a user does, and then tells how it stands whenever it is asked.
fn guard(path: &Path, ttl: Duration) {
    let locks = Locks::over(Arc::new(open(path))).unwrap();
    say("ready");
    let guard = block_on(locks.mutex("a").ttl(ttl).lock()).unwrap();
    say(&format!("held {}", guard.fencing_token()));
    while std::io::stdin().read_line(&mut String::new()).unwrap() > 0 {
        say(&format!("{:?}", guard.status()));
    }
}

/// A hundred waiters, each of which takes the lock when it is its turn.
fn hundred(path: &Path, ttl: Duration) {
    let store = Arc::new(open(path));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let claims: Vec<Claim> = (0..100).map(|_| claim(ttl)).collect();
        let tickets: Vec<_> = claims.iter().map(|claim| ticket(&store, claim)).collect();
        let waiters: Vec<_> = claims
            .into_iter()
            .zip(tickets)
            .map(|(claim, ticket)| {
                let store = store.clone();
                tokio::spawn(async move {
                    let grant = wait_on(&store, &claim, ticket).await;
                    say(&format!("held {}", grant.token));
                    // Never given back: it ends by its TTL.
                })
            })
            .collect();
        say("in line");
        for waiter in waiters {
            waiter.await.unwrap();
        }
    });
}

#[test]
fn the_order_of_arrival_holds_over_processes() {
    let (_folder, path) = place();
    let store = open(&path);
    let held = take(&store);
    let mut waiters = Vec::new();
    for number in 0..4 {
        let mut waiter = Process::start("wait", &path, LONG);
        assert_eq!(waiter.line(), format!("ahead {number}"));
        waiters.push(waiter);
    }
    let mine = claim(LONG);
    assert_eq!(line_up(&store, &mine), 4);
    assert_eq!((show(&store).waiters, show(&store).queue.len()), (5, 5));
    assert!(bells(&path).len() >= 5, "one for each process that waits");
    let mut last = held.token.unwrap();
    pause(SETTLED);
    let before = clock::now();
    give_back(&store, &held);
    // Not one by one to their end: dropped, a process is killed, and this is about those who give back.
    for waiter in &mut waiters {
        let token = waiter.token();
        assert!(token > last, "{token} after {last}");
        last = token;
    }
    assert!(wait_for(&store, &mine).token > last);
    assert!(clock::now().since(before) < SOON, "nobody was woken, the slow rounds found it");
}

#[test]
fn a_handed_lease_is_short_at_first_and_counts_from_before_it_was_handed() {
    let (_folder, path) = place();
    let (store, other) = (open(&path), open(&path));
    let held = take(&store);
    let mine = claim(LONG);
    let ticket = ticket(&other, &mine);
    give_back(&store, &held);
    // It asks a while after it was handed the lock.
    pause(SETTLED);
    let Woken::Granted { grant, sent } = block_on(other.woken(&ticket)) else { panic!("not granted") };
    assert_eq!(grant.ttl, HAND_OFF_TTL);
    let remaining = show(&store).holder.unwrap().remaining.unwrap();
    assert!(sent.boot.plus(grant.ttl) <= clock::now().plus(remaining), "trusted for longer than it is kept");
    let renewed = block_on(other.renew(&[Held::new(&mine, &grant)])).pop().unwrap().unwrap();
    assert!(matches!(renewed, Renewal::Renewed(left) if left == LONG), "{renewed:?}");
}

#[test]
fn a_killed_holders_lock_goes_to_a_waiter_that_nobody_rings() {
    let (_folder, path) = place();
    let store = open(&path);
    let mut holder = Process::start("hold", &path, LONG);
    let token = holder.token();
    let mine = claim(LONG);
    let ticket = ticket(&store, &mine);
    pause(SETTLED);
    holder.kill();
    let before = clock::now();
    let patient = clock::timeout_at(clock::now().plus(PATIENCE), store.woken(&ticket));
    match block_on(patient) {
        Some(Woken::Granted { grant, .. }) => assert!(grant.token > token),
        other => panic!("{other:?}"),
    }
    assert!(clock::now().since(before) < SOON, "only the slow rounds found it");
}

#[test]
fn a_waiter_steps_in_when_holder_and_next_in_line_are_killed() {
    let (_folder, path) = place();
    let store = open(&path);
    let mut holder = Process::start("hold", &path, LONG);
    let _token = holder.token();
    let mut next = Process::start("wait", &path, LONG);
    assert_eq!(next.line(), "ahead 0");
    let mine = claim(LONG);
    assert_eq!(line_up(&store, &mine), 1);
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait_for(&store, &mine));
        next.kill();
        holder.kill();
        waiting.join().unwrap()
    });
    assert_eq!(show(&store).holder.unwrap().token, Some(waiting.token));
    assert_eq!(count(&path, "SELECT count(*) FROM queue"), 0, "the dead one was taken out of line");
}

#[test]
fn without_a_bell_the_rounds_find_what_was_handed_over() {
    for folder_in_its_place in [false, true] {
        let (_folder, path) = place();
        let store = open(&path);
        let held = take(&store);
        let mut waiter = Process::start("wait", &path, LONG);
        assert_eq!(waiter.line(), "ahead 0");
        until(|| !bells(&path).is_empty());
        for bell in bells(&path) {
            fs::remove_file(&bell).unwrap();
            if folder_in_its_place {
                fs::create_dir(&bell).unwrap();
            }
        }
        give_back(&store, &held);
        assert!(waiter.token() > held.token.unwrap());
    }
}

#[test]
fn a_bell_reaches_into_a_container() {
    let container = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let (_folder, path) = place();
    let store = open(&path);
    let held = take(&store);
    let mut waiter = Process::start_in(&container, "wait", &path, LONG);
    assert_eq!(waiter.line(), "ahead 0");
    until(|| !bells(&path).is_empty());
    pause(SETTLED);
    let before = clock::now();
    give_back(&store, &held);
    assert!(waiter.token() > held.token.unwrap());
    assert!(clock::now().since(before) < SOON, "only the slow rounds found it");
}

#[test]
fn a_stopped_process_with_a_hundred_waiters_costs_one_lease() {
    let ttl = Duration::from_secs(1);
    let (_folder, path) = place();
    let store = open(&path);
    let held = take(&store);
    let mut crowd = Process::start("hundred", &path, ttl);
    assert_eq!(crowd.line(), "in line");
    assert_eq!(show(&store).waiters, 100);
    let mine = claim(LONG);
    assert_eq!(line_up(&store, &mine), 100);
    freeze(&crowd, &path);
    let before = clock::now();
    give_back(&store, &held);
    let grant = wait_for(&store, &mine);
    let took = clock::now().since(before);
    assert!(took < 10 * ttl, "{took:?}: it cost several leases");
    // It goes on and finds that it lost its places; it takes nothing until it is given back, and is served then.
    crowd.signal(Signal::CONT);
    until(|| show(&store).waiters >= 99);
    assert_eq!(show(&store).holder.unwrap().token, Some(grant.token));
    give_back(&store, &Held::new(&mine, &grant));
    assert!(crowd.token() > grant.token, "one believed a grant that had ended");
}

#[test]
fn a_guard_that_was_stopped_past_its_lease_says_lost() {
    let ttl = Duration::from_secs(1);
    let (_folder, path) = place();
    let store = open(&path);
    let held = take(&store);
    let mut guard = Process::start("guard", &path, ttl);
    assert_eq!(guard.line(), "ready");
    until(|| show(&store).waiters == 1);
    give_back(&store, &held);
    let token = guard.token();
    freeze(&guard, &path);
    let mine = claim(LONG);
    let grant = wait_for(&store, &mine);
    assert!(grant.token > token);
    guard.signal(Signal::CONT);
    guard.tell("status");
    assert_eq!(guard.line(), format!("{:?}", Status::Lost));
    assert_eq!(show(&store).holder.unwrap().token, Some(grant.token));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_waiters_cancelled_at_once_leave_nothing() {
    let (_folder, path) = place();
    let store = Arc::new(open(&path));
    let locks = Locks::over(store.clone()).unwrap();
    let guard = locks.mutex("a").try_lock().await.unwrap().unwrap();
    let waiters: Vec<_> = (0..1000)
        .map(|_| {
            let mutex = locks.mutex("a");
            tokio::spawn(async move { mutex.lock().await.map(drop) })
        })
        .collect();
    let until = async |sql: &str, wanted: i64| {
        let start = clock::now();
        while count(&path, sql) != wanted {
            assert!(clock::now().since(start) < PATIENCE, "{} and not {wanted}", count(&path, sql));
            clock::sleep(Duration::from_millis(5)).await;
        }
    };
    until("SELECT count(*) FROM queue", 1000).await;
    for waiter in &waiters {
        waiter.abort();
    }
    until("SELECT count(*) FROM queue", 0).await;
    assert_eq!(guard.status(), Status::Held);
    guard.unlock().await.unwrap();
    assert!(locks.mutex("a").try_lock().await.unwrap().is_some());
    drop((locks, store));
    until("SELECT count(*) FROM waiting", 0).await;
}

#[test]
fn those_who_wait_write_nothing_but_one_row_now_and_then_and_nobody_writes_nothing() {
    let (_folder, path) = place();
    let store = Arc::new(open(&path));
    let held = take(&store);
    let ttl = Duration::from_millis(1500);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let claims: Vec<Claim> = (0..100).map(|_| claim(ttl)).collect();
    let tickets: Vec<_> = claims.iter().map(|claim| ticket(&store, claim)).collect();
    let waiting: Vec<_> = claims
        .iter()
        .zip(tickets)
        .map(|(claim, ticket)| {
            let (store, claim) = (store.clone(), claim.clone());
            runtime.spawn(async move { wait_on(&store, &claim, ticket).await })
        })
        .collect();
    let watcher = rusqlite::Connection::open(&path).unwrap();
    let version = || -> i64 { watcher.query_row("PRAGMA data_version", [], |row| row.get(0)).unwrap() };
    // Each change of the number is one commit of somebody else, or several that came together.
    let commits = |span: Duration| {
        let (start, mut last, mut commits) = (clock::now(), version(), 0);
        while clock::now().since(start) < span {
            let now = version();
            commits += u32::from(now != last);
            last = now;
            pause(Duration::from_millis(1));
        }
        commits
    };
    // A third of the TTL apart: five in two and a half seconds.
    let seen = commits(Duration::from_millis(2500));
    assert!((1..=6).contains(&seen), "{seen} commits");
    assert_eq!(show(&store).waiters, 100, "and they are all in line still");
    for waiter in &waiting {
        waiter.abort();
    }
    for claim in &claims {
        block_on(store.release(&Held::queued(claim, 0))).unwrap();
    }
    until(|| bells(&path).is_empty());
    assert_eq!(commits(Duration::from_millis(700)), 0, "nobody waits");
    give_back(&store, &held);
}

#[test]
fn what_is_handed_to_one_who_has_gone_is_passed_on() {
    let (_folder, path) = place();
    let (store, other) = (open(&path), open(&path));
    let held = take(&store);
    // Presented, and never waited for: it counts as there for a while, and its process lives and waits for other things.
    let gone = claim(LONG);
    assert_eq!(line_up(&other, &gone), 0);
    let mine = claim(LONG);
    assert_eq!(line_up(&store, &mine), 1);
    give_back(&store, &held);
    assert_eq!(show(&store).holder.unwrap().id, Some(gone.id), "it was handed over");
    let before = clock::now();
    let _grant = wait_for(&store, &mine);
    assert!(clock::now().since(before) < Duration::from_secs(20), "only the end of its lease freed it");
}

#[test]
fn a_claim_that_nobody_waits_for_is_taken_out_of_line_by_its_own_process() {
    let (_folder, path) = place();
    let (store, other) = (open(&path), open(&path));
    let _held = take(&store);
    let (gone, mine) = (claim(Duration::from_millis(300)), claim(Duration::from_millis(600)));
    assert_eq!((line_up(&other, &gone), line_up(&other, &mine)), (0, 1));
    let patience = clock::now().plus(Duration::from_secs(2));
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(block_on(clock::timeout_at(patience, wait(&other, &mine))).is_none()));
        // The process lives and is heard of, for the other's sake.
        until(|| count(&path, "SELECT count(*) FROM queue") == 1);
        assert_eq!(show(&store).queue[0].id, mine.id);
    });
}

#[test]
fn a_store_that_is_dropped_leaves_the_line() {
    let (_folder, path) = place();
    let (store, other) = (open(&path), open(&path));
    let held = take(&store);
    let gone = claim(LONG);
    assert_eq!(line_up(&other, &gone), 0);
    drop(other);
    until(|| show(&store).waiters == 0);
    until(|| bells(&path).is_empty());
    give_back(&store, &held);
    assert!(show(&store).holder.is_none());
    let tables = "SELECT (SELECT count(*) FROM queue) + (SELECT count(*) FROM waiting)";
    until(|| count(&path, tables) == 0);
}

#[test]
fn the_rows_and_the_bell_of_a_killed_waiter_are_cleared_away() {
    let (_folder, path) = place();
    let store = open(&path);
    let held = take(&store);
    let mut waiter = Process::start("wait", &path, LONG);
    assert_eq!(waiter.line(), "ahead 0");
    until(|| bells(&path).len() == 1);
    waiter.kill();
    assert_eq!(show(&store).waiters, 0, "the dead are not shown");
    let _third = open(&path);
    assert!(bells(&path).is_empty());
    assert_eq!(count(&path, "SELECT (SELECT count(*) FROM queue) + (SELECT count(*) FROM waiting)"), 0);
    give_back(&store, &held);
    assert!(take(&store).token > held.token);
}

#[test]
fn a_line_that_is_full_of_the_dead_is_not_full() {
    let (_folder, path) = place();
    let store = open(&path);
    let _held = take(&store);
    let mut waiter = Process::start("wait", &path, LONG);
    assert_eq!(waiter.line(), "ahead 0");
    let mine = claim(LONG).with_queue_limit(1);
    assert_eq!(block_on(store.acquire(&mine)).unwrap_err().kind(), leasehold::ErrorKind::QueueFull);
    waiter.kill();
    assert_eq!(line_up(&store, &mine), 0);
}

#[test]
fn nobody_comes_before_those_who_wait() {
    let (_folder, path) = place();
    let (store, other) = (open(&path), open(&path));
    let brief = Claim::new(Name::new("a").unwrap(), clock::claim_id(), Duration::from_millis(30));
    let Acquired::Granted(first) = block_on(store.acquire(&brief)).unwrap() else { panic!("busy") };
    let mine = claim(LONG);
    assert_eq!(line_up(&other, &mine), 0);
    pause(brief.ttl);
    // The lease has ended; a passer-by who tries hands the lock on, and is told who has it now.
    let passer_by = claim(LONG).with_queue(false);
    let mut busy = block_on(store.acquire(&passer_by)).unwrap();
    if let Acquired::Busy(holder) = &busy
        && holder.id == Some(brief.id)
    {
        busy = block_on(store.acquire(&passer_by)).unwrap();
    }
    let Acquired::Busy(holder) = busy else { panic!("it came before its turn") };
    assert_eq!(holder.id, Some(mine.id));
    assert!(holder.token > Some(first.token));
    assert_eq!(wait_for(&other, &mine).token, holder.token.unwrap());
}

#[test]
fn a_line_whose_lock_was_forgotten_by_the_first_version_goes_on() {
    let (_folder, path) = place();
    let (store, other) = (open(&path), open(&path));
    let held = take(&store);
    let (first, second) = (claim(LONG), claim(LONG));
    let tickets = [ticket(&other, &first), ticket(&other, &second)];
    pause(SETTLED);
    // What a program of schema version 1 does when it gives back a lock that it has had for a day, and cleans up.
    rusqlite::Connection::open(&path).unwrap().execute("DELETE FROM locks", []).unwrap();
    let mut last = held.token;
    for (claim, ticket) in [first, second].iter().zip(tickets) {
        let patient = clock::timeout_at(clock::now().plus(PATIENCE), wait_on(&other, claim, ticket));
        let grant = block_on(patient).expect("it is never granted");
        assert!(Some(grant.token) > last);
        last = Some(grant.token);
        give_back(&other, &Held::new(claim, &grant));
    }
}

#[test]
fn waits_of_an_owner_are_found() {
    let (_folder, path) = place();
    let store = open(&path);
    let record = |owner: &str| -> Arc<str> { format!("{{\"owner\":\"{owner}\"}}").into() };
    let held = take(&store);
    let (mine, theirs) = (claim(LONG).with_record(record("me")), claim(LONG).with_record(record("you")));
    assert_eq!((line_up(&store, &mine), line_up(&store, &theirs)), (0, 1));
    let waits = |owner: &str| block_on(store.inspect(&Query::Waits { owner: owner.into() })).unwrap().items;
    let found = waits("me");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].holder.as_ref().and_then(|holder| holder.id), Some(held.id));
    let queue: Vec<_> = found[0].queue.iter().map(|waiter| waiter.id).collect();
    assert_eq!(queue, [mine.id]);
    assert_eq!(found[0].waiters, 2);
    assert!(found[0].queue.iter().all(|waiter| waiter.since_unix_micros.is_some()));
    assert!(waits("nobody").is_empty());
    let prefix = Query::Prefix { prefix: Vec::new(), after: None, limit: 5 };
    let listed = block_on(store.inspect(&prefix)).unwrap().items;
    assert_eq!((listed[0].waiters, listed[0].queue.len()), (2, 0));
}
