//! Measures the embedded store: lock and unlock cycles a second by 1 task, by 16 tasks, and by 8 processes, all on
//! distinct names, and the longest that any of them waited for one request; how long a lock takes from one process to
//! another that waits in line; and 8 processes that pass one lock around. About fifteen seconds.
//!
//! `cargo run --release -p leasehold-bench --bin sqlite [FOLDER]`; the folder's disk is what is measured.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a program that measures, on a machine that is up"
)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use leasehold::clock;
use leasehold::store::{Store, Woken};
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold::{Acquired, Claim, Grant, Held, Name, Query, Released};

const SPAN: Duration = Duration::from_secs(2);
const PROCESSES: usize = 8;
const HAND_OFFS: usize = 2_500;

#[derive(Default)]
struct Figures {
    cycles: u64,
    longest: Duration,
}

async fn cycles(store: Arc<SqliteStore>, name: String, until: Instant) -> Figures {
    let name = Name::new(name).unwrap();
    let mut figures = Figures::default();
    while Instant::now() < until {
        let start = Instant::now();
        let claim = Claim::new(name.clone(), clock::claim_id(), Duration::from_secs(30));
        let Acquired::Granted(grant) = store.acquire(&claim).await.unwrap() else { panic!("{name} is held") };
        let middle = Instant::now();
        let released = store.release(&Held::new(&claim, &grant)).await.unwrap();
        assert_eq!(released, Released::Released);
        figures.longest = figures.longest.max(middle - start).max(middle.elapsed());
        figures.cycles += 1;
    }
    figures
}

fn run(store: SqliteStore, tasks: usize) -> Figures {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let store = Arc::new(store);
    let until = Instant::now() + SPAN;
    runtime.block_on(async {
        let running: Vec<_> = (0..tasks)
            .map(|task| tokio::spawn(cycles(store.clone(), format!("{}-{task}", std::process::id()), until)))
            .collect();
        let mut all = Figures::default();
        for one in running {
            let one = one.await.unwrap();
            all.cycles += one.cycles;
            all.longest = all.longest.max(one.longest);
        }
        all
    })
}

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, &Options::default()).unwrap()
}

fn processes(path: &Path, tasks: usize) -> Figures {
    let children: Vec<_> = (0..PROCESSES)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .arg("--child")
                .arg(path)
                .arg(tasks.to_string())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut all = Figures::default();
    for child in children {
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let mut numbers = output.split_whitespace().map(|word| word.parse::<u64>().unwrap());
        all.cycles += numbers.next().unwrap();
        all.longest = all.longest.max(Duration::from_micros(numbers.next().unwrap()));
    }
    all
}

fn show(what: &str, figures: &Figures) {
    let per_second = figures.cycles * 1000 / u64::try_from(SPAN.as_millis()).unwrap();
    println!(
        "{what:<28} {per_second:>7} cycles/s   longest request {:>8.3} ms",
        figures.longest.as_secs_f64() * 1e3
    );
}

/// Presents `claim` and waits in line for it.
async fn wait(store: &SqliteStore, claim: &Claim) -> Grant {
    loop {
        match store.acquire(claim).await.unwrap() {
            Acquired::Granted(grant) => return grant,
            Acquired::Queued(ticket) => {
                if let Woken::Granted { grant, .. } = store.woken(&ticket).await {
                    return grant;
                }
            }
            Acquired::Busy(holder) => panic!("it is to queue: {holder}"),
        }
    }
}

fn one_lock() -> Claim {
    Claim::new(Name::new("one").unwrap(), clock::claim_id(), Duration::from_secs(30)).with_queue(true)
}

fn lines(child: &mut Child) -> impl Iterator<Item = u128> + use<> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.map(|line| line.unwrap().parse().unwrap())
}

fn start(path: &Path, role: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .arg(role)
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Told to on its input, waits in line, says when it got the lock, and gives it back.
async fn waiter(store: SqliteStore) {
    for line in std::io::stdin().lines() {
        line.unwrap();
        let claim = one_lock();
        let grant = wait(&store, &claim).await;
        println!("{}", clock::now().after_boot().as_nanos());
        store.release(&Held::new(&claim, &grant)).await.unwrap();
    }
}

/// From just before a release here to the grant there, sorted. The other process waits as on an idle machine: for some
/// milliseconds.
async fn hand_offs(store: SqliteStore, path: &Path) -> Vec<Duration> {
    let mut child = start(path, "--waiter");
    let mut tell = child.stdin.take().unwrap();
    let mut granted = lines(&mut child);
    let mut took = Vec::new();
    let query = Query::One(Name::new("one").unwrap());
    while took.len() < HAND_OFFS {
        let claim = one_lock();
        let grant = wait(&store, &claim).await;
        tell.write_all(b"\n").unwrap();
        while store.inspect(&query).await.unwrap().items[0].waiters == 0 {}
        clock::sleep(Duration::from_millis(2)).await;
        let released = clock::now().after_boot().as_nanos();
        store.release(&Held::new(&claim, &grant)).await.unwrap();
        let nanos = granted.next().unwrap() - released;
        took.push(Duration::from_nanos(u64::try_from(nanos).unwrap()));
    }
    drop(tell);
    child.wait().unwrap();
    took.sort();
    took
}

/// Takes the one lock and gives it back for a while; says how often.
async fn passer(store: SqliteStore) {
    let (until, mut count) = (Instant::now() + SPAN, 0);
    while Instant::now() < until {
        let claim = one_lock();
        let grant = wait(&store, &claim).await;
        store.release(&Held::new(&claim, &grant)).await.unwrap();
        count += 1;
    }
    println!("{count}");
}

fn one_lock_for_all(path: &Path) {
    let mut children: Vec<Child> = (0..PROCESSES).map(|_| start(path, "--passer")).collect();
    let counts: Vec<u128> = children.iter_mut().map(|child| lines(child).next().unwrap()).collect();
    for mut child in children {
        child.wait().unwrap();
    }
    println!(
        "{PROCESSES} processes on one lock      {:>7} hand-offs/s   fewest of a process {}, most {}",
        counts.iter().sum::<u128>() * 1000 / SPAN.as_millis(),
        counts.iter().min().unwrap(),
        counts.iter().max().unwrap()
    );
}

fn show_hand_offs(path: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let took = runtime.block_on(hand_offs(open(path), path));
    let at = |part: usize| took[(took.len() - 1) * part / 1000].as_secs_f64() * 1e3;
    println!(
        "hand-off to another process  {HAND_OFFS} times: median {:.3} ms, 99 % {:.3} ms, longest {:.3} ms",
        at(500),
        at(990),
        at(1000)
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, path, tasks] = arguments.as_slice()
        && flag == "--child"
    {
        let figures = run(open(Path::new(path)), tasks.parse().unwrap());
        println!("{} {}", figures.cycles, figures.longest.as_micros());
        return;
    }
    if let [role, path] = arguments.as_slice()
        && role.starts_with("--")
    {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let store = open(Path::new(path));
        match role.as_str() {
            "--waiter" => runtime.block_on(waiter(store)),
            _ => runtime.block_on(passer(store)),
        }
        return;
    }
    let base = arguments.first().map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = base.join(format!("leasehold-bench-{}", clock::claim_id()));
    let path = folder.join("locks.db");
    for tasks in [1, 16] {
        show(&format!("one process, {tasks} task(s)"), &run(open(&path), tasks));
    }
    for tasks in [1, 16] {
        show(&format!("{PROCESSES} processes, {tasks} task(s) each"), &processes(&path, tasks));
    }
    show_hand_offs(&path);
    one_lock_for_all(&path);
    std::fs::remove_dir_all(folder).unwrap();
}
