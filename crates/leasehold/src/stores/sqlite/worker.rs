//! The thread that does a store's blocking work, so that no caller's executor waits for a disk or a lock.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::database::Database;
use super::{Options, open};
use crate::error::{Error, ErrorKind, Result};

/// How many requests one turn at the gate may serve: what other processes wait is bounded by this.
const TURN: usize = 32;
/// How long a store that is dropped waits for its files to be put in order.
const FAREWELL: Duration = Duration::from_millis(100);

/// A request; it finds out itself whether anybody still waits for its answer.
type Job = Box<dyn FnOnce(&mut Database) + Send>;

/// The handle of the thread. Dropping it lets the thread finish what was asked and end.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Option<Sender<Job>>,
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
        let (opened, answer) = channel();
        let (farewell, ended) = channel();
        let work = move || {
            let mut database = match open::open(&path, &options) {
                Ok(database) => database,
                Err(error) => return drop(opened.send(Err(error))),
            };
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

    /// Has the thread do `work` and waits for its answer.
    ///
    /// # Cancel safety
    /// Dropped before the thread came to it, nothing is done; dropped later, all of it.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Database) -> T + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |database| {
            if !reply.is_closed() {
                // The caller may have gone while it was done: it is then unknown to the caller, as the contract says.
                let _ = reply.send(work(database));
            }
        });
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if !sent {
            return Err(Error::new(ErrorKind::Unavailable, "the thread of the lock database has ended"));
        }
        answer.await.map_err(|_| ended_early())
    }
}

fn ended_early() -> Error {
    Error::new(ErrorKind::Unknown, "the thread of the lock database ended in the middle of a request")
}

/// Serves requests until every handle is gone, some of them in each turn at the gate.
fn serve(database: &mut Database, inbox: &Receiver<Job>) {
    while let Ok(first) = inbox.recv() {
        first(database);
        for job in inbox.try_iter().take(TURN - 1) {
            job(database);
        }
        database.leave();
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
