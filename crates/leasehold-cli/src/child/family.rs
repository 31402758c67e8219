//! All processes below this one: to be signalled, killed and reaped.
//!
//! A process that left the command's group or session, or whose parent has died, is still below a subreaper.

use std::collections::HashSet;
use std::fs;

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid, pidfd_open, pidfd_send_signal, wait,
};

/// The descendants of this process, except those that it had from before.
#[derive(Debug)]
pub(crate) struct Family {
    strangers: HashSet<i32>,
}

impl Family {
    /// Begins a family: children that exist now (a shell may have replaced itself by this program) are none of it, all
    /// later descendants are, also orphans.
    pub(crate) fn found() -> Self {
        let _ = rustix::process::set_child_subreaper(Some(getpid()));
        Self { strangers: children_of(own_pid()).into_iter().collect() }
    }

    /// The living members, parents before children.
    pub(crate) fn members(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut seen = self.strangers.clone();
        let mut next = children_of(own_pid());
        while let Some(pid) = next.pop() {
            if seen.insert(pid) {
                found.push(pid);
                next.extend(children_of(pid));
            }
        }
        found
    }

    /// Sends a signal to all members, or to those of one process group.
    pub(crate) fn signal(&self, signal: Signal, group: Option<i32>) {
        let members = self.members();
        let known: HashSet<i32> = members.iter().copied().chain([own_pid()]).collect();
        for pid in members {
            signal_if_still(pid, signal, |stat| {
                known.contains(&stat.parent) && group.is_none_or(|group| group == stat.group)
            });
        }
    }

    /// Sends a signal that ends, and wakes those who are stopped so that they take it.
    pub(crate) fn end(&self, signal: Signal) {
        self.signal(signal, None);
        if signal != Signal::KILL {
            self.signal(Signal::CONT, None);
        }
    }

    /// Reaps one dead child; `Err` when there is no child left at all.
    pub(crate) fn reap(&self) -> Result<Option<(i32, WaitStatus)>, NoneLeft> {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => return Ok(Some((pid.as_raw_nonzero().get(), status))),
                Ok(None) if !self.strangers.is_empty() && self.members().is_empty() => return Err(NoneLeft),
                Ok(None) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(_) => return Err(NoneLeft),
            }
        }
    }

    /// Kills all, until none is left. Returns how the process `main` ended, if it was reaped here.
    pub(crate) fn destroy(&self, main: Option<i32>) -> Option<WaitStatus> {
        let mut ended = None;
        loop {
            self.end(Signal::KILL);
            loop {
                match self.reap() {
                    Ok(Some((pid, status))) if Some(pid) == main => ended = Some(status),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(NoneLeft) => return ended,
                }
            }
            pollster::block_on(leasehold::clock::sleep(crate::plan::Leash::KILL_AGAIN));
        }
    }
}

/// Every child is reaped.
#[derive(Debug)]
pub(crate) struct NoneLeft;

fn own_pid() -> i32 {
    getpid().as_raw_nonzero().get()
}

struct Stat {
    parent: i32,
    group: i32,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name, in brackets, and may hold anything.
    let after = text.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(&text[after + 1..]).ok()?;
    let mut fields = rest.split_ascii_whitespace().skip(1);
    Some(Stat { parent: fields.next()?.parse().ok()?, group: fields.next()?.parse().ok()? })
}

/// Signals a process by a handle, having looked that the handle is of the process meant: a number is used again.
fn signal_if_still(pid: i32, signal: Signal, meant: impl Fn(&Stat) -> bool) {
    let Some(number) = Pid::from_raw(pid) else { return };
    let Ok(handle) = pidfd_open(number, PidfdFlags::empty()) else { return };
    if stat(pid).is_some_and(|stat| meant(&stat)) {
        let _ = pidfd_send_signal(&handle, signal);
    }
}

fn children_of(pid: i32) -> Vec<i32> {
    let mut children = Vec::new();
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return children };
    for thread in threads.flatten() {
        match fs::read_to_string(thread.path().join("children")) {
            Ok(list) => {
                children.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
            }
            // Either the thread is gone, or the kernel was built without these lists.
            Err(_) if thread.path().exists() => return children_by_search(pid),
            Err(_) => {}
        }
    }
    children
}

fn children_by_search(parent: i32) -> Vec<i32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|&pid| stat(pid).is_some_and(|stat| stat.parent == parent)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_finding_children_agree() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(children_of(own_pid()).contains(&pid));
        assert!(children_by_search(own_pid()).contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!children_by_search(own_pid()).contains(&pid));
    }
}
