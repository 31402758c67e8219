//! Measures the embedded store: lock and unlock cycles a second by 1 task, by 16 tasks, and by 8 processes, all on
//! distinct names, and the longest that any of them waited for one request. About ten seconds.
//!
//! `cargo run --release -p leasehold-bench --bin sqlite [FOLDER]`; the folder's disk is what is measured.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a program that measures, on a machine that is up"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use leasehold::clock;
use leasehold::store::Store;
use leasehold::stores::sqlite::{Options, SqliteStore};
use leasehold::{Acquired, Claim, Held, Name, Released};

const SPAN: Duration = Duration::from_secs(2);
const PROCESSES: usize = 8;

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

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, path, tasks] = arguments.as_slice()
        && flag == "--child"
    {
        let figures = run(open(Path::new(path)), tasks.parse().unwrap());
        println!("{} {}", figures.cycles, figures.longest.as_micros());
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
    std::fs::remove_dir_all(folder).unwrap();
}
