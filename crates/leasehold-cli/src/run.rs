//! `leasehold run`: acquire, start the command under a guardian, feed the guardian deadlines, release after the reap.

use std::ffi::OsString;
use std::pin::pin;

use leasehold::clock::{self, Instant};
use leasehold::{Error, ErrorKind, GuardSet, Holder, Locks, Name, Released, Status};
use serde_json::json;

use crate::child::{self, Ended, Guarded, Message, Orders, Outside, Report, Signals, Surroundings};
use crate::exit;
use crate::plan::{OnLost, Patience, RunPlan, human, title};
use crate::status::{Reporter, say};

/// Runs the plan against the store at `store`; returns the exit code.
pub(crate) async fn run(store: &str, plan: &RunPlan, around: Surroundings) -> u8 {
    let events = match plan.status_fd.map(child::open_descriptor).transpose() {
        Ok(events) => events,
        Err(error) => {
            say(&format!("--status-fd {}: {error}", plan.status_fd.unwrap_or_default()));
            return exit::USAGE;
        }
    };
    let reporter = Reporter::new(&plan.names, events, plan.json, plan.quiet_if_busy);
    let mut signals = match Signals::listen(around.front) {
        Ok(signals) => signals,
        Err(error) => return reporter.failed(&format!("cannot listen for signals: {error}"), exit::FAILURE),
    };
    let asked = match unless_ended(&mut signals, ask(store, plan, &reporter)).await {
        Ok(asked) => asked,
        Err(code) => return code,
    };
    match asked {
        Ok((locks, Some(guard))) => {
            let orders = Orders {
                leash: plan.leash,
                deadline: guard.valid_until(),
                group: around.group,
                command: plan.command.clone(),
            };
            Run { plan, reporter: &reporter, signals, locks }.under(guard, orders, around.stdin).await
        }
        Ok((_, None)) => plan.busy_code,
        Err(error) => {
            let code = if error.kind() == ErrorKind::Invalid { exit::USAGE } else { exit::FAILURE };
            reporter.failed(&error.to_string(), code)
        }
    }
}

/// What `work` gives; dropped, and the exit code for it, if a signal asks us to end before.
async fn unless_ended<T>(signals: &mut Signals, work: impl Future<Output = T>) -> Result<T, u8> {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Ok(done),
            outside = signals.next() => match outside {
                Outside::Signal(number, _) if child::asks_to_end(number) => return Err(exit::signalled(number)),
                Outside::Signal(..) => {}
                Outside::FrontGone => return Err(exit::FAILURE),
            },
        }
    }
}

/// Connects and asks for the lock; `None`: somebody else has it and the patience is over, as was told.
async fn ask(store: &str, plan: &RunPlan, reporter: &Reporter) -> Result<(Locks, Option<GuardSet>), Error> {
    let started = clock::now();
    let locks = leasehold::connect(store).await?;
    let mut mutex = locks.all(plan.names.iter().map(Name::as_bytes)).ttl(plan.ttl);
    if let Some(label) = &plan.label {
        mutex = mutex.label(label);
    }
    if let Some(owner) = &plan.owner {
        mutex = mutex.owner(owner);
    }
    for (key, value) in &plan.metadata {
        mutex = mutex.metadata(key, value);
    }
    if let Some(guard) = mutex.try_lock().await? {
        return Ok((locks, Some(guard)));
    }
    let (name, holder) = holder(&locks, plan).await;
    let got = match plan.patience {
        Patience::None => Ok(None),
        Patience::For(span) => {
            reporter.held_by("waiting", holder.as_ref(), |who| format!("waiting for {name}, held by {who}"));
            mutex.lock_for(span.saturating_sub(clock::now().since(started))).await
        }
        Patience::Endless => {
            reporter.held_by("waiting", holder.as_ref(), |who| format!("waiting for {name}, held by {who}"));
            mutex.lock().await.map(Some)
        }
    };
    let guard = match got {
        Err(error) if error.kind() == ErrorKind::Busy => None,
        // Busy at the first look, and the time was up in the middle of the next.
        Err(error) if error.kind() == ErrorKind::Unknown && is_up(plan.patience, started) => None,
        other => other?,
    };
    if guard.is_none() {
        let (name, holder) = self::holder(&locks, plan).await;
        reporter.held_by("busy", holder.as_ref(), |who| match plan.patience {
            Patience::For(span) => format!("{name} is held by {who}; gave up after {}", human(span)),
            _ => format!("{name} is held by {who}"),
        });
    }
    Ok((locks, guard))
}

fn is_up(patience: Patience, started: Instant) -> bool {
    matches!(patience, Patience::For(span) if clock::now().since(started) >= span)
}

/// The first of the locks that somebody holds, and who, for people: not knowing is no failure.
async fn holder(locks: &Locks, plan: &RunPlan) -> (String, Option<Holder>) {
    for name in &plan.names {
        match locks.show(name.as_bytes()).await.map(|view| view.holder) {
            Ok(Some(holder)) => return (name.to_string(), Some(holder)),
            Ok(None) => {}
            Err(_) => break,
        }
    }
    (title(&plan.names), None)
}

/// What became of the command.
struct Outcome {
    ended: Ended,
    /// Whether the lock cannot be shown to have been held until everything was reaped.
    lost: bool,
}

struct Run<'a> {
    plan: &'a RunPlan,
    reporter: &'a Reporter,
    signals: Signals,
    locks: Locks,
}

impl Run<'_> {
    /// From the grant to the release.
    async fn under(mut self, guard: GuardSet, mut orders: Orders, stdin: child::Input) -> u8 {
        let granted_at = clock::now();
        self.tell_acquired(&guard);
        let leash = self.plan.leash;
        if guard.remaining() <= leash.kill_after + leash.margin {
            // A lock that was handed over has a short lease at first. If it cannot be made longer, that is said below.
            let _ = guard.extend(self.plan.ttl).await;
        }
        let changed = guard.changed();
        orders.deadline = guard.valid_until();
        if guard.remaining() <= leash.kill_after + leash.margin {
            let left = human(guard.remaining());
            let why = format!(
                "the lock was granted for {left} only, too short to stop the command in: raise --ttl"
            );
            return self.give_up(guard, &why).await;
        }
        let environment = self.environment(&guard);
        let lifeline = self.locks.lifeline();
        let guarded = match Guarded::start(&orders, &environment, stdin, lifeline.as_deref()) {
            Ok(guarded) => guarded,
            Err(error) => return self.give_up(guard, &format!("cannot start the guardian: {error}")).await,
        };
        let outcome = match self.supervise(&guard, guarded, orders.deadline, changed).await {
            Ok(outcome) => outcome,
            Err(why) => return self.give_up(guard, &why).await,
        };
        self.tell_exited(&outcome);
        self.finish(guard, outcome, granted_at).await
    }

    /// Watches over command, lock and signals until the whole family is gone.
    async fn supervise(
        &mut self,
        guard: &GuardSet,
        mut guarded: Guarded,
        mut deadline: Instant,
        changed: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Outcome, String> {
        let ignore = self.plan.leash.on_lost == OnLost::Ignore;
        let mut changed: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(changed);
        let mut loss = pin!(guard.lost());
        let (mut lost, mut started, mut unsure) = (false, false, false);
        loop {
            // The guardian kills at the margin. If it cannot (stopped, say) this is the last moment to do it here.
            let last = if ignore { Instant::FAR } else { deadline.minus(self.plan.leash.margin / 2) };
            tokio::select! {
                // In this order: whoever wakes after a pause hears first what the guardian has done meanwhile.
                biased;
                said = guarded.next() => match said {
                    Some(Message::Done(report)) => {
                        guarded.part();
                        return Ok(self.judge(guard, report, lost));
                    }
                    Some(Message::Started(pid)) => {
                        started = true;
                        self.reporter.tell("started", json!({ "pid": pid }), None);
                    }
                    Some(Message::Failed(errno)) => {
                        guarded.part();
                        return Err(child::not_started(errno));
                    }
                    Some(_) => {}
                    None => {
                        let ended = guarded.destroy();
                        self.reporter.note("the guardian of the command died; the command was killed");
                        return Ok(Outcome { ended, lost: lost || clock::now() > guard.valid_until() });
                    }
                },
                (name, why) = &mut loss, if !lost => {
                    guarded.tell(Message::Stop);
                    lost = true;
                    let then = if ignore { "the command runs on" } else { "stopping the command" };
                    let message = format!("the lock {name} is lost: {why}; {then}");
                    let details = self.details(&name, json!({ "reason": why.to_string() }));
                    self.reporter.tell("lost", details, Some(message));
                }
                () = &mut changed, if !lost => {
                    changed = Box::pin(guard.changed());
                    deadline = deadline.max(guard.valid_until());
                    guarded.tell(Message::Deadline(deadline));
                    self.tell_doubt(guard, &mut unsure);
                }
                outside = self.signals.next() => match outside {
                    Outside::Signal(number, from_terminal) => {
                        // What the terminal sent before the command was there has not reached it.
                        guarded.tell(Message::Signal(number, from_terminal && started));
                    }
                    Outside::FrontGone => guarded.tell(Message::Stop),
                },
                () = clock::sleep_until(last) => {
                    let ended = guarded.destroy();
                    self.reporter.note("the guardian did not stop the command in time; the command was killed");
                    return Ok(Outcome { ended, lost: true });
                }
            }
        }
    }

    /// Says once when renewals begin to fail, and once when they are answered again.
    fn tell_doubt(&mut self, guard: &GuardSet, unsure: &mut bool) {
        let now = guard.status() == Status::Unsure;
        if std::mem::replace(unsure, now) == now {
            return;
        }
        let (name, left) = (title(&self.plan.names), human(guard.remaining()));
        let message = if now {
            format!(
                "the lock {name} could not be renewed, trying again; it is lost in {left} unless that succeeds"
            )
        } else {
            format!("the lock {name} is renewed again")
        };
        let event = if now { "unsure" } else { "held" };
        self.reporter.tell(
            event,
            json!({ "remaining_ms": u64::try_from(guard.remaining().as_millis()).unwrap_or(u64::MAX) }),
            Some(message),
        );
    }

    /// Whether the lock was provably held until the last process was reaped.
    fn judge(&self, guard: &GuardSet, report: Report, lost: bool) -> Outcome {
        if report.cut_short && !lost {
            self.reporter.note(&format!(
                "the lock {} was not renewed in time; the command was stopped before it could pass on",
                title(&self.plan.names)
            ));
        }
        if report.leftovers > 0 {
            self.reporter.note(&format!(
                "the command left {} running; stopped before the release",
                if report.leftovers == 1 {
                    "a process".into()
                } else {
                    format!("{} processes", report.leftovers)
                }
            ));
        }
        let outlived = report.reaped_at > guard.valid_until();
        Outcome { ended: report.ended, lost: lost || report.cut_short || outlived }
    }

    /// Holds on for the least time asked for, releases, and says how it all ended.
    async fn finish(mut self, guard: GuardSet, mut outcome: Outcome, granted_at: Instant) -> u8 {
        let mut code = match outcome.ended {
            Ended::Code(code) => code,
            Ended::Signal(number) => exit::signalled(i32::from(number)),
        };
        let until = granted_at.plus(self.plan.hold_at_least);
        if !outcome.lost && clock::now() < until {
            let lost = guard.lost();
            let hold = unless_ended(&mut self.signals, clock::timeout_at(until, lost));
            match hold.await {
                Ok(None) => {}
                Ok(Some((name, why))) => {
                    self.reporter.note(&format!("the lock {name} is lost: {why}"));
                    outcome.lost = true;
                }
                Err(ended) => code = ended,
            }
        }
        let known = outcome.lost;
        for (name, answer) in guard.unlock().await {
            match answer {
                Ok(answer) => {
                    self.tell_released(&name, answer, known);
                    outcome.lost |= answer != Released::Released;
                }
                Err(error) => {
                    self.reporter
                        .note(&format!("the lock ends by itself, it could not be released: {error}"));
                }
            }
        }
        if outcome.lost { exit::LOST } else { code }
    }

    /// Nothing was run: releases and says why.
    async fn give_up(self, guard: GuardSet, why: &str) -> u8 {
        let _ = guard.unlock().await;
        self.reporter.failed(why, exit::FAILURE)
    }

    /// What the command finds in its environment; what has no value is not to be there.
    fn environment(&self, guard: &GuardSet) -> Vec<(&'static str, Option<OsString>)> {
        let names: Vec<_> = guard.guards().iter().map(|guard| guard.name().as_bytes()).collect();
        let tokens: Vec<_> = guard.fencing_tokens().iter().map(ToString::to_string).collect();
        let owners: Vec<_> = guard.guards().iter().map(|guard| guard.claim_id().to_string()).collect();
        let names = child::os_string(&names.join(&b'\n'));
        let (tokens, owners) = (OsString::from(tokens.join("\n")), OsString::from(owners.join("\n")));
        let single = |value: &OsString| (guard.guards().len() == 1).then(|| value.clone());
        vec![
            ("LEASEHOLD_NAME", single(&names)),
            ("LEASEHOLD_TOKEN", single(&tokens)),
            ("LEASEHOLD_OWNER", single(&owners)),
            ("LEASEHOLD_NAMES", Some(names)),
            ("LEASEHOLD_TOKENS", Some(tokens)),
            ("LEASEHOLD_OWNERS", Some(owners)),
            ("LEASEHOLD_TTL_MS", Some(self.plan.ttl.as_millis().to_string().into())),
        ]
    }

    /// What an event says of one lock: which one, if there are several.
    fn details(&self, name: &Name, mut details: serde_json::Value) -> serde_json::Value {
        if self.plan.names.len() > 1 {
            details["name"] = json!(name.to_string());
        }
        details
    }

    fn tell_acquired(&self, guard: &GuardSet) {
        let ttl = u64::try_from(self.plan.ttl.as_millis()).unwrap_or(u64::MAX);
        for guard in guard.guards() {
            let (token, owner) = (guard.fencing_token().get(), guard.claim_id().to_string());
            let details =
                self.details(guard.name(), json!({ "token": token, "owner": owner, "ttl_ms": ttl }));
            self.reporter.tell("acquired", details, None);
        }
    }

    fn tell_exited(&self, outcome: &Outcome) {
        let (code, signal) = match outcome.ended {
            Ended::Code(code) => (Some(code), None),
            Ended::Signal(number) => (None, Some(number)),
        };
        self.reporter.tell("exited", json!({ "code": code, "signal": signal, "lost": outcome.lost }), None);
    }

    fn tell_released(&self, name: &Name, answer: Released, known: bool) {
        let (word, message) = match answer {
            Released::Released => ("released", None),
            Released::NotHeld => ("not-held", Some("was no longer held")),
            Released::HeldByOther => ("held-by-other", Some("is held by somebody else by now")),
        };
        let message = message.filter(|_| !known);
        let message = message.map(|what| format!("the lock {name} {what} when it was to be released"));
        self.reporter.tell("released", self.details(name, json!({ "answer": word })), message);
    }
}
