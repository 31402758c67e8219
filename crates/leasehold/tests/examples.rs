//! The examples, run on every store as they stand.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use leasehold_chaos::servers::RedisServer;

#[path = "../examples/obtain_refresh.rs"]
mod obtain_refresh;
#[path = "../examples/six_lines.rs"]
mod six_lines;

const SIX_LINES: &str = "\
First lock acquired!
Could not get a second lock which is as expected this is where you would force the request out.
Still could not get the third lock since the first lock is still set.
First lock released!
Forth Lock acquired!
Forth Lock released!
";

async fn six_lines(url: &str, work: Duration) {
    let mut out = Vec::new();
    six_lines::six_lines(url, work, &mut out).await.unwrap();
    assert_eq!(String::from_utf8(out).unwrap(), SIX_LINES);
}

async fn obtain_refresh(url: &str) {
    // A machine that is busy for longer than the 50 ms between two steps of the walk loses the lock earlier, and the
    // walk says so: then it is walked again, which shows nothing less.
    for _ in 0..20 {
        let mut out = Vec::new();
        match obtain_refresh::obtain_refresh(url, &mut out).await {
            Err(error) if error.to_string().contains("was lost") => continue,
            ended => ended.unwrap(),
        }
        let text = String::from_utf8(out).unwrap();
        let whole =
            "I have a lock!\nYay, I still have my lock!\nNow, my lock has expired!\nThe guard says: Lost.\n";
        if text == whole {
            return;
        }
        assert!(
            !text.contains("I have a lock!\nThe guard") && text.contains("The guard says: Lost."),
            "{text}"
        );
    }
    panic!("the machine was too busy twenty times in a row");
}

fn sqlite() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("locks.db").display());
    (folder, url)
}

#[tokio::test]
async fn six_lines_on_redis_as_it_stands() {
    let server = RedisServer::start();
    six_lines(&server.url(), Duration::from_secs(5)).await;
}

#[tokio::test]
async fn six_lines_on_sqlite() {
    let (_folder, url) = sqlite();
    six_lines(&url, Duration::from_millis(50)).await;
}

#[tokio::test]
async fn six_lines_on_memory() {
    six_lines("memory:", Duration::from_millis(50)).await;
}

#[tokio::test]
async fn obtain_refresh_on_redis() {
    let server = RedisServer::start();
    obtain_refresh(&server.url()).await;
}

#[tokio::test]
async fn obtain_refresh_on_sqlite() {
    let (_folder, url) = sqlite();
    obtain_refresh(&url).await;
}

#[tokio::test]
async fn obtain_refresh_on_memory() {
    obtain_refresh("memory:").await;
}
