//! A lock is taken, refused twice while it is held, released, taken again and released: six lines, on any store.
//!
//! `cargo run --example six_lines -- redis://127.0.0.1:6379`

use std::io::Write;
use std::time::Duration;

use leasehold::clock;

/// Runs the demonstration on the store at `url`, working for `work` under the lock, and prints to `out`.
pub(crate) async fn six_lines(
    url: &str,
    work: Duration,
    out: &mut impl Write,
) -> Result<(), Box<dyn std::error::Error>> {
    let locks = leasehold::connect(url).await?;
    let my_lock = locks.mutex("my_lock").ttl(Duration::from_secs(10));

    let Some(first) = my_lock.try_lock().await? else {
        return Err("somebody else holds my_lock: is the demonstration running twice?".into());
    };
    writeln!(out, "First lock acquired!")?;

    if my_lock.try_lock().await?.is_none() {
        writeln!(
            out,
            "Could not get a second lock which is as expected this is where you would force the request out."
        )?;
    }
    clock::sleep(work).await;
    if my_lock.try_lock().await?.is_none() {
        writeln!(out, "Still could not get the third lock since the first lock is still set.")?;
    }
    first.unlock().await?;
    writeln!(out, "First lock released!")?;

    if let Some(fourth) = my_lock.try_lock().await? {
        writeln!(out, "Forth Lock acquired!")?;
        fourth.unlock().await?;
        writeln!(out, "Forth Lock released!")?;
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
#[allow(dead_code, reason = "the tests include this file as a module")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "redis://127.0.0.1:6379".into());
    six_lines(&url, Duration::from_secs(5), &mut std::io::stdout()).await
}
