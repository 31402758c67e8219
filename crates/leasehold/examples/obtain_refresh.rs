//! Obtain a lock for 100 ms, look at its time, refresh it, and let it run out.
//!
//! `cargo run --example obtain_refresh -- redis://127.0.0.1:6379`

use std::io::Write;
use std::time::Duration;

use leasehold::clock;

/// Runs the walk on the store at `url` and prints to `out`.
pub(crate) async fn obtain_refresh(
    url: &str,
    out: &mut impl Write,
) -> Result<(), Box<dyn std::error::Error>> {
    const TTL: Duration = Duration::from_millis(100);
    let locks = leasehold::connect(url).await?;
    let mutex = locks.mutex("my-key").ttl(TTL).renew(false); // nothing renews it behind our back

    // Busy is an answer, not an error.
    let Some(lock) = mutex.try_lock().await? else {
        writeln!(out, "Could not obtain lock!")?;
        return Ok(());
    };
    writeln!(out, "I have a lock!")?;

    clock::sleep(Duration::from_millis(50)).await;
    if !lock.ttl().await?.is_zero() {
        writeln!(out, "Yay, I still have my lock!")?;
    }

    lock.extend(TTL).await?;
    clock::sleep(TTL).await;
    // The lock is gone by now; whoever asks the guard is told so too.
    if lock.ttl().await?.is_zero() {
        writeln!(out, "Now, my lock has expired!")?;
    }
    writeln!(out, "The guard says: {:?}.", lock.status())?;
    lock.unlock().await?; // a calm answer, not an error
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
#[allow(dead_code, reason = "the tests include this file as a module")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "redis://127.0.0.1:6379".into());
    obtain_refresh(&url, &mut std::io::stdout()).await
}
