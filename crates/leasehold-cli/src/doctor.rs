//! `leasehold doctor`: is the store fit for locks?

use std::fmt::Write as _;

use leasehold::{Finding, Result, Severity};

use crate::args::DoctorArgs;
use crate::exit;
use crate::view::{BAD, DIM, GOOD, HEADING, WARN, escaped, json_lines, styled};

/// What to print, and the exit code.
pub(crate) async fn run(store: &str, args: &DoctorArgs) -> Result<(String, u8)> {
    let findings = leasehold::diagnose(store).await;
    let broken = findings.iter().any(|finding| finding.severity == Severity::Failure);
    let text = if args.json {
        json_lines(findings.iter().map(|finding| serde_json::json!(finding)))
    } else {
        for_people(&findings)
    };
    Ok((text, if broken { exit::UNHEALTHY } else { 0 }))
}

/// The worst first, each group under a heading of its own.
fn for_people(findings: &[Finding]) -> String {
    let groups = [
        (Severity::Failure, styled(BAD, "✗"), "Locks do not work"),
        (Severity::Warning, styled(WARN, "!"), "Less safe than it could be"),
        (Severity::Note, styled(DIM, "·"), "Good to know"),
        (Severity::Good, styled(GOOD, "✓"), "As it should be"),
    ];
    let widest = findings.iter().map(|finding| finding.check.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (severity, mark, heading) in groups {
        let mut group = findings.iter().filter(|finding| finding.severity == severity).peekable();
        if group.peek().is_none() {
            continue;
        }
        let _ = writeln!(text, "{}", styled(HEADING, heading));
        for finding in group {
            let check = escaped(&finding.check);
            let _ = writeln!(text, "  {mark} {check:widest$}  {}", escaped(&finding.found));
            if !finding.meaning.is_empty() {
                let _ = writeln!(text, "    {:widest$}  {}", "", styled(DIM, escaped(&finding.meaning)));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_comes_first() {
        let findings = [
            Finding::new("reach", Severity::Good, "12 ms", ""),
            Finding::new("role", Severity::Failure, "replica", "takes no writes"),
            Finding::new("eviction", Severity::Warning, "allkeys-lru", "locks can vanish"),
        ];
        let text = anstream::adapter::strip_str(&for_people(&findings)).to_string();
        let expected = "\
Locks do not work
  ✗ role      replica
              takes no writes
Less safe than it could be
  ! eviction  allkeys-lru
              locks can vanish
As it should be
  ✓ reach     12 ms
";
        assert_eq!(text, expected);
    }
}
