//! The release of one lock that nobody waits for: Leasehold's script beside the native compare-and-delete of Valkey 9
//! (`DELIFEQ`). Prints medians of interleaved rounds; asserts nothing. docs/adr/0012 tells what came of it.
//!
//! `cargo run --release -p leasehold-bench --bin release`; a program after it (`valkey-9`, or a path) is measured instead.
#![allow(clippy::disallowed_methods, reason = "a benchmark measures with the monotonic clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::time::Instant;

use leasehold_chaos::servers::RedisServer;
use redis::{Cmd, Connection, Script};

const ROUNDS: usize = 9;
/// Releases in a round.
const COUNT: usize = 20_000;
/// Commands sent at once where only the server's time is to count.
const PIPELINE: usize = 100;

/// The script that Leasehold sends.
const RELEASE: &str = concat!(
    include_str!("../../../crates/leasehold/src/stores/redis/release_plain.lua"),
    include_str!("../../../crates/leasehold/src/stores/redis/line.lua"),
    include_str!("../../../crates/leasehold/src/stores/redis/release.lua"),
);

#[derive(Clone, Copy)]
enum How {
    Script,
    /// One call of the script for all of a pipeline.
    Together,
    Native,
}

fn main() {
    let program = std::env::args().nth(1).unwrap_or_else(|| "valkey-9".into());
    let server = RedisServer::builder().program(&program).start();
    let mut connection = redis::Client::open(server.url()).unwrap().get_connection().unwrap();
    let digest: String = redis::cmd("SCRIPT").arg("LOAD").arg(RELEASE).query(&mut connection).unwrap();
    assert_eq!(digest, Script::new(RELEASE).get_hash());
    println!(
        "the release of a lock that nobody waits for, us; medians of {ROUNDS} interleaved rounds of {COUNT}"
    );
    println!("{:>42} {:>8} {:>8} {:>8}", "", "script", "DELIFEQ", "ratio");
    for (what, pipeline) in [("one after the other, with its round trip", 1), ("100 sent together", PIPELINE)]
    {
        let (mut scripts, mut natives) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            scripts.push(round(&mut connection, &digest, How::Script, pipeline));
            natives.push(round(&mut connection, &digest, How::Native, pipeline));
        }
        print(what, median(&mut scripts, |times| times.0), median(&mut natives, |times| times.0));
        if pipeline > 1 {
            let (script, native) = (median(&mut scripts, |t| t.1), median(&mut natives, |t| t.1));
            print("of which in the command, says the server", script, native);
            // As Leasehold sends releases that are ready at the same moment.
            let mut together: Vec<_> =
                (0..ROUNDS).map(|_| round(&mut connection, &digest, How::Together, pipeline)).collect();
            print(
                "100 in one call of the script",
                median(&mut together, |t| t.0),
                median(&mut natives, |t| t.0),
            );
        }
    }
}

fn print(what: &str, script: f64, native: f64) {
    println!("{what:>42} {script:>8.2} {native:>8.2} {:>8.2}", native / script);
}

fn median(values: &mut [(f64, f64)], which: impl Fn(&(f64, f64)) -> f64) -> f64 {
    values.sort_by(|a, b| which(a).total_cmp(&which(b)));
    which(&values[values.len() / 2])
}

fn owner(number: usize) -> String {
    format!("lh1:{number:032x}:")
}

/// The value of a lock as Leasehold writes it: claim, token, and a record of usual length.
fn value(number: usize) -> String {
    let record = r#"{"host":"worker-17.example","pid":31337,"program":"billing","label":"nightly"}"#;
    format!("{}1795300000000000:{record}", owner(number))
}

fn call(digest: &str, how: How, number: usize) -> Cmd {
    let name = format!("tenant:{number}:report");
    let mut call = Cmd::new();
    match how {
        How::Script => call.arg("EVALSHA").arg(digest).arg(1).arg(name).arg(owner(number)),
        How::Native => call.arg("DELIFEQ").arg(name).arg(value(number)),
        How::Together => unreachable!("it has calls of its own"),
    };
    call
}

fn call_together(digest: &str, numbers: std::ops::Range<usize>) -> Cmd {
    let mut call = redis::cmd("EVALSHA");
    call.arg(digest).arg(numbers.len());
    call.arg(numbers.clone().map(|number| format!("tenant:{number}:report")).collect::<Vec<_>>());
    call.arg(numbers.map(owner).collect::<Vec<_>>());
    call
}

/// Microseconds for a release: by the caller's clock, and inside the command as the server counts them.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn round(connection: &mut Connection, digest: &str, how: How, pipeline: usize) -> (f64, f64) {
    for first in (0..COUNT).step_by(PIPELINE) {
        let mut sets = redis::Pipeline::new();
        for number in first..first + PIPELINE {
            let name = format!("tenant:{number}:report");
            sets.cmd("SET").arg(name).arg(value(number)).arg("NX").arg("PX").arg(30_000).ignore();
        }
        sets.exec(connection).unwrap();
    }
    redis::cmd("CONFIG").arg("RESETSTAT").exec(connection).unwrap();
    let began = Instant::now();
    for first in (0..COUNT).step_by(pipeline) {
        let numbers = first..first + pipeline;
        let answers: Vec<u8> = if let How::Together = how {
            call_together(digest, numbers).query(connection).unwrap()
        } else {
            let mut calls = redis::Pipeline::new();
            for number in numbers {
                calls.add_command(call(digest, how, number));
            }
            calls.query(connection).unwrap()
        };
        assert!(answers.iter().all(|released| *released == 1));
    }
    let micros = began.elapsed().as_secs_f64() * 1e6 / COUNT as f64;
    (micros, inside(connection, how))
}

/// Microseconds a call, by the server's statistics.
fn inside(connection: &mut Connection, how: How) -> f64 {
    let info: String = redis::cmd("INFO").arg("commandstats").query(connection).unwrap();
    let name = match how {
        How::Script | How::Together => "cmdstat_evalsha:",
        How::Native => "cmdstat_delifeq:",
    };
    let line = info.lines().find(|line| line.starts_with(name)).unwrap();
    let field = line.split(',').find_map(|field| field.strip_prefix("usec_per_call=")).unwrap();
    field.parse().unwrap()
}
