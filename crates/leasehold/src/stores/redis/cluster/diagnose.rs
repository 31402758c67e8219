//! What an operator should know about a cluster before trusting it with locks.

use redis::Value;

use super::super::diagnose;
use super::super::keys::{SLOTS, text_of_slot};
use super::super::look::Facts;
use super::super::reply::{self, Refusal};
use super::ClusterStore;
use super::nodes::Node;
use crate::clock;
use crate::error::Result;
use crate::types::{Finding, Name, Severity};

impl ClusterStore {
    pub(super) async fn findings(&self) -> Vec<Finding> {
        if let Err(error) = self.nodes.refresh().await {
            let meaning = "no lock can be taken or kept";
            return vec![Finding::new("reach", Severity::Failure, error.to_string(), meaning)];
        }
        let masters = self.nodes.masters();
        let mut findings = vec![self.state(&masters).await, self.slots(masters.len())];
        for (node, first) in &masters {
            match self.node(node, *first).await {
                Ok(found) => findings.extend(found),
                Err(error) => findings.push(Finding::new(
                    format!("node {}", node.endpoint),
                    Severity::Failure,
                    error.to_string(),
                    "the locks of its slots cannot be taken or kept until it is back, or a replica takes its place",
                )),
            }
        }
        findings
    }

    /// What the cluster says of itself, by the first node that answers.
    async fn state(&self, masters: &[(Node, u16)]) -> Finding {
        for (node, _) in masters {
            let connector = &node.store.connector;
            let deadline = self.deadline(None);
            let Ok(link) = connector.link(deadline).await else { continue };
            let mut question = redis::cmd("CLUSTER");
            question.arg("INFO");
            let Ok(answer) = connector.send(&link, &question, deadline).await else { continue };
            let text = reply::text(&answer).unwrap_or_default();
            let state = text.lines().find_map(|line| line.strip_prefix("cluster_state:")).map(str::trim);
            return match state {
                Some("ok") => Finding::new("cluster state", Severity::Good, "ok", "every slot is served"),
                Some(state) => Finding::new(
                    "cluster state",
                    Severity::Failure,
                    state,
                    "locks cannot be taken: look at `redis-cli --cluster check`",
                ),
                None => Finding::new(
                    "cluster state",
                    Severity::Note,
                    "the node would not tell (CLUSTER INFO)",
                    "grant it to see whether the cluster is whole",
                ),
            };
        }
        Finding::new("cluster state", Severity::Failure, "no master answers", "no lock can be taken or kept")
    }

    fn slots(&self, masters: usize) -> Finding {
        let covered = self.nodes.covered();
        let found = format!("{covered} of {SLOTS}, on {masters} masters");
        if covered == usize::from(SLOTS) {
            Finding::new("slots", Severity::Good, found, "every name has a node")
        } else {
            Finding::new("slots", Severity::Failure, found, "names whose slot nobody has cannot be locked")
        }
    }

    async fn node(&self, node: &Node, first: u16) -> Result<Vec<Finding>> {
        let check = |what: &str| format!("{what} of {}", node.endpoint);
        let facts = Facts::ask(&node.store.connector).await?;
        let mut findings = vec![role(&facts, check("role"))];
        for mut found in [diagnose::persistence(&facts), diagnose::eviction(&facts), diagnose::memory(&facts)]
        {
            found.check = check(&found.check);
            findings.push(found);
        }
        // Keys of a slot that the node has, or the trial would be sent on.
        let (tag, id) = (text_of_slot(first), clock::claim_id());
        let name = Name::new(format!("leasehold-probe-{{{tag}}}-{id}"))?;
        let index = [&*self.keyspace.index_in(first), b":probe-", id.to_string().as_bytes()].concat();
        let link = node.store.connector.link(self.deadline(None)).await?;
        for mut found in node.store.rights(&link, &name, &index).await? {
            found.check = check(&found.check);
            findings.push(found);
        }
        findings.extend(self.cluster_rights(node, &index).await?);
        Ok(findings)
    }

    /// The rights that only a cluster needs: nothing if they are there.
    async fn cluster_rights(&self, node: &Node, key: &[u8]) -> Result<Vec<Finding>> {
        let connector = &node.store.connector;
        let link = connector.link(self.deadline(None)).await?;
        let mut trials = redis::Pipeline::new();
        trials.cmd("CLUSTER").arg("SLOTS").cmd("CLUSTER").arg("INFO").cmd("PUBSUB").arg("NUMSUB");
        // There is no such list; the right is looked at first.
        trials.cmd("LSET").arg(key).arg(0).arg("").cmd("ASKING").cmd("PING");
        let answers = connector.send_all(&link, &trials, self.deadline(None)).await?;
        let rights = ["CLUSTER SLOTS", "CLUSTER INFO", "PUBSUB NUMSUB", "LSET", "ASKING"];
        let is_lacking = |answer: &Value| match answer {
            Value::ServerError(error) => Refusal::of(error).is_lacking_right(),
            _ => false,
        };
        let lacking = rights.into_iter().zip(answers).filter(|(_, answer)| is_lacking(answer));
        let told = lacking.map(|(right, _)| {
            Finding::new(
                format!("rights of {}", node.endpoint),
                Severity::Failure,
                format!("the right is lacking: {right}"),
                "grant what docs/cluster.md lists with ACL SETUSER, on every node",
            )
        });
        Ok(told.collect())
    }
}

fn role(facts: &Facts, check: String) -> Finding {
    match (facts.is_replica(), facts.replicas()) {
        (true, _) => Finding::new(
            check,
            Severity::Warning,
            "a replica by now",
            "the cluster has just changed: look again in a moment",
        ),
        (false, Some(0)) => Finding::new(
            check,
            Severity::Warning,
            "master without replicas",
            "if it dies the locks of its slots cannot be taken, and unless cluster-require-full-coverage is no, none can",
        ),
        (false, Some(replicas)) => Finding::new(
            check,
            Severity::Note,
            format!("master, replicas: {replicas}"),
            "replication is asynchronous: a failover can lose the last grants; let the resource check tokens",
        ),
        (false, None) => Finding::new(
            check,
            Severity::Note,
            "the node would not tell (INFO)",
            "grant INFO to see its replicas",
        ),
    }
}
