//! Sends what is ready at the same moment in one command.
//!
//! A script call costs the server more than what a lock does in it, and a command costs the client more than its
//! bytes. So claims and releases that are ready together go together; one that is alone goes alone, at once: nothing
//! ever waits for company.
#![expect(clippy::vec_box, reason = "jobs are handed on one by one, and a pointer moves quicker than they")]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use redis::aio::MultiplexedConnection;
use redis::{Cmd, RedisError, RedisWrite, Value};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::reply::Refusal;
use super::script::{ACQUIRE, By, RELEASE};
use crate::clock::{self, Instant};

/// The most claims in one command: what keeps the server from its other clients for about a millisecond at worst.
const MOST: usize = 100;

/// What a job asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    /// Arguments: lock, fence; owner, record, ttl, wish.
    Acquire,
    /// Arguments: lock, fence; owner. The fence goes without saying where it follows from the lock.
    Release,
}

/// One claim's part of a command.
#[derive(Debug)]
pub(super) struct Job {
    verb: Verb,
    bytes: Vec<u8>,
    ends: [usize; 6],
    count: usize,
    /// Whether a script can tell the side keys from the lock's.
    is_plain: bool,
    /// Only jobs of one slot share a command; on one server all have the same.
    slot: u16,
    deadline: Instant,
    answer: Option<oneshot::Sender<Result<Value, Unanswered>>>,
}

impl Job {
    pub(super) fn new(verb: Verb, is_plain: bool, slot: u16, capacity: usize) -> Self {
        Self {
            verb,
            slot,
            bytes: Vec::with_capacity(capacity),
            ends: [0; 6],
            count: 0,
            is_plain,
            deadline: Instant::FAR,
            answer: None,
        }
    }

    /// Adds an argument.
    pub(super) fn push(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        write(&mut self.bytes)?;
        self.ends[self.count] = self.bytes.len();
        self.count += 1;
        Ok(())
    }

    fn argument(&self, number: usize) -> &[u8] {
        let start = if number == 0 { 0 } else { self.ends[number - 1] };
        &self.bytes[start..self.ends[number]]
    }

    fn is_wanted(&self) -> bool {
        self.answer.as_ref().is_some_and(|answer| !answer.is_closed())
    }

    fn finish(&mut self, answer: Result<Value, Unanswered>) {
        if let Some(sender) = self.answer.take() {
            // Whoever asked may have gone: then nobody wants to know.
            let _ = sender.send(answer);
        }
    }
}

/// Calls under way from which on the next ones go together.
const ALONE: usize = 2;
/// Commands under way from which on jobs gather. The next answer is then about an eighth of a round trip away: that is
/// the most that company can cost.
const UNDER_WAY: usize = 8;

/// Until when an answer is worth waiting for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    pub(super) deadline: Instant,
    /// Whether it is shorter than the others', so that it may end in the queue, behind commands that have more.
    pub(super) is_short: bool,
    /// Whether the slot is only on its way to the server, which then serves who says so.
    pub(super) asking: bool,
}

/// Where jobs are handed in.
#[derive(Debug)]
pub(super) struct Counter {
    jobs: mpsc::UnboundedSender<Box<Job>>,
    under_way: AtomicUsize,
}

/// What became of a job that got no answer.
#[derive(Clone, Debug)]
pub(super) enum Unanswered {
    /// Nobody serves any more: nothing was sent.
    NotSent,
    /// It may have been done.
    Broken(RedisError),
    /// It may have been done; nothing was heard in time.
    Late,
    /// It may have been done; nobody serves any more.
    Ended,
}

struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Counter {
    /// Serves a connection for as long as the counter lives; to be called on the runtime of the connection.
    pub(super) fn open(connection: MultiplexedConnection, closed: Arc<AtomicBool>) -> Self {
        let (jobs, receiver) = mpsc::unbounded_channel();
        tokio::spawn(serve(receiver, connection, closed));
        Self { jobs, under_way: AtomicUsize::new(0) }
    }

    /// Has a job done.
    pub(super) async fn submit(
        &self,
        connection: &MultiplexedConnection,
        mut job: Box<Job>,
        patience: Patience,
    ) -> Result<Value, Unanswered> {
        let others = self.under_way.fetch_add(1, Ordering::Relaxed);
        let _under_way = UnderWay(&self.under_way);
        job.deadline = patience.deadline;
        if others < ALONE {
            // Without company the way through the counter would only cost time.
            let batch = std::slice::from_ref(&job);
            // Boxed, for its room is ten times that of the way in company, and each claim's future has it.
            let answer = Box::pin(clock::timeout_at(job.deadline, call_alone(connection, batch))).await;
            return answer
                .map_or(Err(Unanswered::Late), |answer| answer.map(only).map_err(Unanswered::Broken));
        }
        let (sender, receiver) = oneshot::channel();
        job.answer = Some(sender);
        self.jobs.send(job).map_err(|_| Unanswered::NotSent)?;
        // A timer for each command costs more than the command: the batch has one. All that are in the queue before a
        // patient job end before it does, so it comes to its turn in time.
        let answer = if patience.is_short {
            clock::timeout_at(patience.deadline, receiver).await.ok_or(Unanswered::Late)?
        } else {
            receiver.await
        };
        answer.map_err(|_| Unanswered::Ended)?
    }
}

/// The answer of a command for one job.
pub(super) fn only(answer: Value) -> Value {
    match answer {
        Value::Array(mut answers) if answers.len() == 1 => answers.swap_remove(0),
        answer => answer,
    }
}

async fn serve(
    mut jobs: mpsc::UnboundedReceiver<Box<Job>>,
    connection: MultiplexedConnection,
    closed: Arc<AtomicBool>,
) {
    let mut ready = Vec::with_capacity(MOST);
    // Ends with the counter: a call into a black hole must not keep its connection for ever.
    let mut calls = JoinSet::new();
    loop {
        while calls.try_join_next().is_some() {}
        if calls.len() >= UNDER_WAY {
            calls.join_next().await;
        }
        if jobs.recv_many(&mut ready, MOST).await == 0 {
            return;
        }
        let (mut acquires, mut releases) = (Vec::new(), Vec::new());
        for job in ready.drain(..).filter(|job| job.is_wanted()) {
            match job.verb {
                Verb::Acquire => acquires.push(job),
                Verb::Release => releases.push(job),
            }
        }
        for batch in [releases, acquires] {
            if batch.is_empty() {
                continue;
            }
            let mut parts = by_slot(batch);
            if let [_] = parts[..] {
                calls.spawn(run(parts.swap_remove(0), connection.clone(), closed.clone()));
            } else {
                calls.spawn(run_all(parts, connection.clone(), closed.clone()));
            }
        }
    }
}

/// The jobs of each slot by themselves: a cluster takes no command about two.
fn by_slot(mut batch: Vec<Box<Job>>) -> Vec<Vec<Box<Job>>> {
    if batch.iter().all(|job| job.slot == batch[0].slot) {
        return vec![batch];
    }
    // Those of one slot stay in their order.
    batch.sort_by_key(|job| job.slot);
    let mut parts: Vec<Vec<Box<Job>>> = Vec::new();
    for job in batch {
        match parts.last_mut() {
            Some(part) if part[0].slot == job.slot => part.push(job),
            _ => parts.push(vec![job]),
        }
    }
    parts
}

/// Commands that are ready together: they go in one write, and count as one.
async fn run_all(parts: Vec<Vec<Box<Job>>>, connection: MultiplexedConnection, closed: Arc<AtomicBool>) {
    let mut calls = JoinSet::new();
    for part in parts {
        calls.spawn(run(part, connection.clone(), closed.clone()));
    }
    while calls.join_next().await.is_some() {}
}

async fn run(mut batch: Vec<Box<Job>>, connection: MultiplexedConnection, closed: Arc<AtomicBool>) {
    let Some(mut answer) = call(&connection, &mut batch).await else { return };
    if batch.len() > 1 && matches!(answer, Ok(Value::ServerError(_))) {
        // Refused as a whole: who is meant? Each by itself will tell; what was done already answers as before.
        for job in &mut batch {
            if let Some(answer) = call(&connection, std::slice::from_mut(job)).await {
                finish(std::slice::from_mut(job), answer);
            }
        }
        return;
    }
    if answer.is_err() {
        closed.store(true, Ordering::Release);
    }
    if let Ok(Value::Array(answers)) = &mut answer
        && answers.len() == batch.len()
    {
        for (job, answer) in batch.iter_mut().zip(answers.drain(..)) {
            job.finish(Ok(answer));
        }
        return;
    }
    finish(&mut batch, answer);
}

fn finish(batch: &mut [Box<Job>], answer: Result<Value, RedisError>) {
    let answer = answer.map_err(Unanswered::Broken);
    match batch {
        [job] => job.finish(answer.map(only)),
        batch => batch.iter_mut().for_each(|job| job.finish(answer.clone())),
    }
}

/// Calls for a batch, and tells those whose time is up meanwhile. `None` if nobody is left to be told.
async fn call(
    connection: &MultiplexedConnection,
    batch: &mut [Box<Job>],
) -> Option<Result<Value, RedisError>> {
    let first = command(batch, By::Digest);
    let answer = heard(batch, send(connection, &first)).await?;
    match &answer {
        Ok(Value::ServerError(error)) if Refusal::of(error).is_unknown_script() => {
            let second = command(batch, By::Text);
            heard(batch, send(connection, &second)).await
        }
        _ => Some(answer),
    }
}

/// Calls for jobs whose callers mind the time themselves.
async fn call_alone(connection: &MultiplexedConnection, batch: &[Box<Job>]) -> Result<Value, RedisError> {
    let answer = send(connection, &command(batch, By::Digest)).await?;
    match &answer {
        Value::ServerError(error) if Refusal::of(error).is_unknown_script() => {
            send(connection, &command(batch, By::Text)).await
        }
        _ => Ok(answer),
    }
}

async fn send(connection: &MultiplexedConnection, command: &Cmd) -> Result<Value, RedisError> {
    connection.clone().send_packed_command(command).await
}

/// What `work` gives, unless the time of all jobs is up before.
async fn heard<T>(batch: &mut [Box<Job>], work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    loop {
        let deadline = batch.iter().filter(|job| job.is_wanted()).map(|job| job.deadline).min()?;
        if let Some(answer) = clock::timeout_at(deadline, &mut work).await {
            return Some(answer);
        }
        let now = clock::now();
        for job in batch.iter_mut().filter(|job| job.deadline <= now) {
            job.finish(Err(Unanswered::Late));
        }
    }
}

/// The command for some jobs of one verb.
pub(super) fn command(batch: &[Box<Job>], by: By) -> Cmd {
    let bytes = batch.iter().map(|job| job.bytes.len()).sum();
    if batch[0].verb == Verb::Acquire {
        let mut call = ACQUIRE.call(by, 2 * batch.len(), 4 * batch.len(), bytes);
        for number in 0..3 {
            write_all(&mut call, batch, number);
        }
        // Every argument costs the server time, and most claims of a process differ in nothing but lock and owner.
        let same = |number| batch.iter().all(|job| job.argument(number) == batch[0].argument(number));
        let tail = if (3..6).all(same) { &batch[..1] } else { batch };
        for number in 3..6 {
            write_all(&mut call, tail, number);
        }
        return call;
    }
    let is_plain = batch.iter().all(|job| job.is_plain);
    let keys = if is_plain { batch.len() } else { 2 * batch.len() };
    let mut call = RELEASE.call(by, keys, batch.len(), bytes);
    write_all(&mut call, batch, 0);
    if !is_plain {
        write_all(&mut call, batch, 1);
    }
    write_all(&mut call, batch, 2);
    call
}

/// That argument of every job.
fn write_all(call: &mut Cmd, batch: &[Box<Job>], number: usize) {
    for job in batch {
        call.write_arg(job.argument(number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_share_a_command_with_all_others_of_their_slot_and_with_no_other() {
        let of = |slots: &[u16]| -> Vec<Vec<u16>> {
            let jobs = slots.iter().map(|slot| Box::new(Job::new(Verb::Acquire, true, *slot, 0))).collect();
            by_slot(jobs).iter().map(|part| part.iter().map(|job| job.slot).collect()).collect()
        };
        assert_eq!(of(&[7, 7, 7]), [[7, 7, 7]]);
        assert_eq!(of(&[2, 1, 2, 3, 1]), [vec![1, 1], vec![2, 2], vec![3]]);
    }
}
