//! The other process of a test: the same test program, run again with the URL of the server in its environment.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use leasehold::{Guard, Locks, Status};
use leasehold_chaos::checker::boot_nanos;
use leasehold_chaos::{PATIENCE, eventually};
use pollster::block_on;
use rustix::process::{Pid, Signal, kill_process};
use tokio::task::JoinHandle;

use super::{connect, ms};

const URL: &str = "LEASEHOLD_TEST_URL";

/// Another process, killed when dropped.
pub struct Other {
    pub process: Child,
    input: ChildStdin,
    said: Receiver<String>,
}

impl Other {
    /// Runs that test of this program in a process of its own.
    pub fn start(test: &str, url: &str, adjust: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture"]).env(URL, url);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        adjust(&mut command);
        let mut process = command.spawn().unwrap();
        let (input, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some(said) = line.trim_end().strip_prefix("said: ") {
                    let _ = sender.send(said.to_owned());
                }
            }
        });
        Self { process, input, said }
    }

    /// A process that waits for locks as it is told: its test `other` calls [`serve`].
    pub fn waiting(url: &str) -> Self {
        let mut other = Self::start("other", url, |_| {});
        assert_eq!(other.hear(), "ready");
        other
    }

    /// The next line that it said.
    #[track_caller]
    pub fn hear(&mut self) -> String {
        self.said.recv_timeout(PATIENCE).expect("the other process says something, in time")
    }

    /// What it said and nobody heard yet.
    pub fn heard_meanwhile(&self) -> Vec<String> {
        self.said.try_iter().collect()
    }

    pub fn tell(&mut self) {
        self.order("go on");
    }

    /// Tells it to do something: see [`serve`].
    pub fn order(&mut self, order: &str) {
        self.input.write_all(format!("{order}\n").as_bytes()).unwrap();
    }

    /// Lets so many of its tasks wait for a lock, one after the other; returns when all are in line, or hold it.
    #[track_caller]
    pub fn wait_in_line(&mut self, name: &str, ttl: u64, count: usize, mode: &str) {
        self.order(&format!("wait {name} {ttl} {count} {mode}"));
        assert_eq!(self.hear(), "in line");
    }

    /// Lets one of its tasks take a lock that is free, and keep it.
    #[track_caller]
    pub fn hold(&mut self, name: &str, ttl: u64) {
        self.order(&format!("wait {name} {ttl} 1 hold"));
        let mut said = [self.hear(), self.hear()];
        said.sort();
        assert!(said[0].starts_with("held ") && said[1] == "in line", "{said:?}");
    }

    /// The next hold that it tells of: token, and since when, by the boot-time clock in nanoseconds.
    #[track_caller]
    pub fn hear_hold(&mut self) -> (u64, u64) {
        let said = self.hear();
        let mut words = said.split(' ');
        assert_eq!(words.next(), Some("held"), "{said}");
        let mut number = || words.next().unwrap().parse().unwrap();
        (number(), number())
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Kills it with -9, and returns when it is gone.
    pub fn kill9(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// In the other process: the URL it is to use.
pub fn other_role() -> Option<String> {
    std::env::var(URL).ok()
}

/// In the other process: says a line.
pub fn say(text: &str) {
    // The name of the test stands on the line already.
    println!("\nsaid: {text}");
}

/// In the other process: the next order; ends with the first process.
fn next_order() -> String {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap_or(0) == 0 {
        std::process::exit(1);
    }
    line.trim_end().to_owned()
}

/// In the other process: waits for the first to go on; ends with it.
pub fn wait_to_be_told() {
    next_order();
}

type Guards = Arc<Mutex<Vec<Guard>>>;

/// In the other process, if this is one: does what it is told.
///
/// - `wait NAME TTL COUNT MODE`: tasks join the line one after the other, then it says `in line`; each says
///   `held TOKEN NANOS` when it holds the lock, and `failed ..` if it never will. Mode `pass` unlocks at once, `hold` keeps.
/// - `confirm`: waits until the oldest guard is sure, then says its status as it was and is.
/// - `unlock`: unlocks the oldest guard and says how that stood.
/// - `cancel`: drops all that wait, and says `cancelled` when the store has heard of it.
pub fn serve() {
    let Some(url) = other_role() else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let locks = connect(&url);
    let (guards, mut tasks) = (Guards::default(), Vec::new());
    say("ready");
    loop {
        let order = next_order();
        let words: Vec<_> = order.split(' ').collect();
        let oldest = || guards.lock().unwrap_or_else(PoisonError::into_inner).remove(0);
        match words.as_slice() {
            ["wait", name, ttl, count, mode] => {
                for _ in 0..count.parse().unwrap() {
                    tasks.push(runtime.block_on(join_line(
                        &locks,
                        name,
                        ttl.parse().unwrap(),
                        mode,
                        &guards,
                    )));
                }
                say("in line");
            }
            ["confirm"] => {
                let guard = oldest();
                let before = guard.status();
                eventually("confirmed", || guard.status() == Status::Held);
                say(&format!("{before:?} {:?}", guard.status()));
                guards.lock().unwrap_or_else(PoisonError::into_inner).insert(0, guard);
            }
            ["unlock"] => {
                let guard = oldest();
                say(&format!("{:?} {:?}", guard.status(), block_on(guard.unlock())));
            }
            ["cancel"] => {
                tasks.iter().for_each(JoinHandle::abort);
                tasks.drain(..).for_each(|task| drop(runtime.block_on(task)));
                block_on(locks.clone().close());
                say("cancelled");
            }
            _ => panic!("no such order: {order}"),
        }
    }
}

/// Starts a task that waits, and returns when it is in line or holds.
async fn join_line(locks: &Locks, name: &str, ttl: u64, mode: &str, guards: &Guards) -> JoinHandle<()> {
    let (sender, mut joined) = tokio::sync::mpsc::unbounded_channel();
    let told = sender.clone();
    let mutex = locks.mutex(name).ttl(ms(ttl)).on_wait(move |_| {
        let _ = told.send(());
    });
    let (holds, guards) = (mode == "hold", guards.clone());
    let task = tokio::spawn(async move {
        match mutex.lock().await {
            Ok(guard) => {
                let held = format!("held {} {}", guard.fencing_token(), boot_nanos());
                if holds {
                    guards.lock().unwrap_or_else(PoisonError::into_inner).push(guard);
                    say(&held);
                } else {
                    say(&held);
                    let _ = guard.unlock().await;
                }
            }
            Err(error) => say(&format!("failed {error}")),
        }
        drop(sender);
    });
    let _ = joined.recv().await;
    task
}
