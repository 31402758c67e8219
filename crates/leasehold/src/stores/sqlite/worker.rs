//! The thread that does a store's blocking work, so that no caller's executor waits for a disk or a lock.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::database::Database;
use super::{Options, open};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};

/// How many requests one turn at the gate may serve: what other processes wait is bounded by this.
const TURN: usize = 32;
/// How long a request waits for its answer: what a disk or a queue of other processes may take, and no more.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a store that is dropped waits for its files to be put in order.
const FAREWELL: Duration = Duration::from_millis(100);

/// A request; it finds out itself whether anybody still waits for its answer, and gives back how to answer.
pub(super) type Job = Box<dyn FnOnce(&mut Database) -> Option<Answer> + Send>;
pub(super) type Answer = Box<dyn FnOnce() + Send>;

/// The handle of the thread. Dropping it lets the thread finish what was asked and end.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Option<Arc<Sender<Job>>>,
    ended: Mutex<Receiver<()>>,
}

impl Worker {
    /// Starts the thread, which opens the database; waits for that, and gives back what `look` saw in it.
    pub(super) fn start<T: Send + 'static>(
        path: PathBuf,
        options: Options,
        look: impl FnOnce(&Database) -> T + Send + 'static,
    ) -> Result<(Self, T)> {
        let (jobs, inbox) = channel();
        let jobs = Arc::new(jobs);
        let caller = Arc::downgrade(&jobs);
        let (opened, answer) = channel();
        let (farewell, ended) = channel();
        let work = move || {
            let mut database = match open::open(&path, &options) {
                Ok(database) => database,
                Err(error) => return drop(opened.send(Err(error))),
            };
            database.rounds.call_by(caller);
            if opened.send(Ok(look(&database))).is_ok() {
                serve(&mut database, &inbox);
            }
            database.retire();
            drop(database);
            drop(farewell);
        };
        std::thread::Builder::new().name("leasehold-sqlite".into()).spawn(work).map_err(|e| {
            Error::new(ErrorKind::Unavailable, "the thread of the lock database could not be started")
                .caused_by(e)
        })?;
        let seen = answer.recv().unwrap_or_else(|_| Err(ended_early()))?;
        Ok((Self { jobs: Some(jobs), ended: Mutex::new(ended) }, seen))
    }

    /// Has the thread do `work` without a turn at the gate and waits for its answer: for looking.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> T + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.send(Box::new(move |database| {
            (!reply.is_closed()).then(|| answer_with(reply, work(database)))
        }))?;
        answer.await.map_err(|_| ended_early())
    }

    /// Has the thread do `work`, a transaction, in its turn at the gate and waits for its answer.
    ///
    /// # Cancel safety
    /// Dropped before its turn came, nothing is done; dropped later, all of it.
    ///
    /// # Errors
    /// Those of `work`, and `Unknown` if no answer came in five seconds.
    pub(super) async fn transact<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Database) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.send(Box::new(move |database| {
            if reply.is_closed() {
                return None;
            }
            let entered = database.enter();
            // The wait for the turn may have been long.
            (!reply.is_closed()).then(|| answer_with(reply, entered.and_then(|()| work(database))))
        }))?;
        match clock::timeout_at(clock::now().plus(PATIENCE), answer).await {
            Some(answer) => answer.unwrap_or_else(|_| Err(ended_early())),
            None => Err(Error::new(ErrorKind::Unknown, "the lock database did not answer in time").advise(
                "a program that is stopped or frozen may stand in its gate: `fuser -v FILE-gate` names it",
            )),
        }
    }

    fn send(&self, job: Job) -> Result<()> {
        match self.jobs.as_ref().map(|jobs| jobs.send(job)) {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::new(ErrorKind::Unavailable, "the thread of the lock database has ended")),
        }
    }
}

fn ended_early() -> Error {
    Error::new(ErrorKind::Unknown, "the thread of the lock database ended in the middle of a request")
}

fn answer_with<T: Send + 'static>(reply: oneshot::Sender<T>, outcome: T) -> Answer {
    Box::new(move || {
        // A caller that went while it was done does not know the outcome, as the contract says.
        let _ = reply.send(outcome);
    })
}

/// Serves requests until every handle is gone, some of them in each turn at the gate.
fn serve(database: &mut Database, inbox: &Receiver<Job>) {
    let mut answers = Vec::with_capacity(TURN);
    while let Ok(first) = inbox.recv() {
        let others = inbox.try_iter().take(TURN - 1);
        answers.extend(std::iter::once(first).chain(others).filter_map(|job| job(database)));
        database.leave();
        // Only now: a process that is stopped as soon as it has its answer must not be stopped at the gate.
        answers.drain(..).for_each(|answer| answer());
        database.settle();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        // Ordinarily a millisecond. A program that ends meanwhile leaves small files, which the next opening removes.
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = ended.recv_timeout(FAREWELL);
    }
}
