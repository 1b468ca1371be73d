//! The roster: which workers have a link, and what is free on their devices.

use std::sync::Arc;
use std::time::Instant;

use common::wire::message::{Command, HeldShard};

use super::{CoordinatorActor, Worker};
use crate::actors::link::Link;
use crate::actors::messages::{Joined, MemberJoined, MemberLeft, MemberNews, ShardReport};
use crate::actors::slot::{Slot, Stage};
use crate::policy::placement::Place;

impl CoordinatorActor {
    pub(super) fn joined(&mut self, message: Joined) {
        let Joined { hello, link } = message;
        let id = hello.worker.clone();
        if let Some(before) = self.workers.remove(&id) {
            tracing::info!(worker = %id, same_life = before.boot == hello.boot, "a newer link replaces the worker's older one");
            if before.boot == hello.boot {
                before.link.cut();
            } else {
                before.link.refuse(format!("another process has joined as {id}; give each worker its own device in cluster.toml"));
            }
            self.member_left(&before.link, "a newer link of the worker took its place");
        }
        tracing::info!(worker = %id, device = hello.device.name, shards = hello.shards.len(), "worker joined");
        for slot in self.slots.values_mut() {
            let Stage::Running(running) = &slot.stage else {
                continue;
            };
            if running.assignment.members.contains(&id) {
                let generation = running.assignment.generation;
                let held = |shard: &&HeldShard| {
                    (shard.replica, shard.generation) == (slot.replica, generation)
                };
                let held = hello.shards.iter().find(held).cloned();
                running.addr.do_send(MemberJoined {
                    link: link.clone(),
                    held,
                });
            }
        }
        for shard in &hello.shards {
            let slot = self.slots.get_mut(&shard.replica);
            // What a worker holds that another has replaced serves nobody.
            let keep = slot
                .as_ref()
                .is_some_and(|slot| !slot.is_retiring() && slot.members.contains(&id));
            let wanted = slot
                .and_then(|slot| slot.running(shard.generation))
                .is_some();
            if !wanted {
                let (replica, generation) = (shard.replica, shard.generation);
                link.command(Command::Unload {
                    term: self.means.term,
                    replica,
                    generation,
                    keep,
                });
            }
        }
        if let Some(rates) = hello.device.rates {
            self.rates.insert(id.clone(), (hello.device.kind, rates));
        }
        let worker = Worker {
            boot: hello.boot,
            link,
            device: hello.device,
            group_address: hello.group_address,
        };
        self.workers.insert(id, worker);
        metrics::gauge!("tandem_workers").set(self.workers.len() as f64);
        self.room_was_made();
    }

    pub(super) fn left(&mut self, link: &Arc<Link>, reason: &str) {
        let current = self
            .workers
            .get(&link.worker)
            .is_some_and(|worker| Arc::ptr_eq(&worker.link, link));
        if current {
            tracing::warn!(worker = %link.worker, reason, "worker left");
            self.workers.remove(&link.worker);
            metrics::gauge!("tandem_workers").set(self.workers.len() as f64);
            self.member_left(link, reason);
        }
    }

    pub(super) fn member_left(&mut self, link: &Arc<Link>, reason: &str) {
        for slot in self.slots.values() {
            if let Stage::Running(running) = &slot.stage
                && running.assignment.members.contains(&link.worker)
            {
                running.addr.do_send(MemberLeft {
                    link: link.clone(),
                    reason: reason.to_owned(),
                });
            }
        }
    }

    pub(super) fn shard_report(&mut self, message: ShardReport) {
        let running = self
            .slots
            .get_mut(&message.replica)
            .and_then(|slot| slot.running(message.generation));
        if let Some(running) = running {
            running.addr.do_send(MemberNews {
                link: message.link,
                news: message.news,
            });
        }
    }

    pub(super) fn room_was_made(&mut self) {
        let now = Instant::now();
        self.slots.values_mut().for_each(|slot| slot.retry_now(now));
    }

    /// The devices of cluster.toml with what is free on them. `ignore` says whose claims do not count.
    pub(super) fn places(&self, all_there: bool, ignore: impl Fn(&Slot) -> bool) -> Vec<Place> {
        let mut places = Vec::new();
        for node in &self.means.cluster.nodes {
            for device in &node.devices {
                let worker = self.workers.get(&device.worker);
                let bytes = worker
                    .map(|worker| worker.device.memory_bytes)
                    .or(device.memory_bytes);
                let claimed: u64 = self
                    .slots
                    .values()
                    .filter(|slot| !ignore(slot))
                    .map(|slot| slot.claim(&device.worker))
                    .sum();
                places.push(Place {
                    worker: device.worker.0.clone(),
                    node: node.name.clone(),
                    kind: device.kind,
                    free_bytes: bytes.map(|bytes| bytes.saturating_sub(claimed)),
                    rank_before: None,
                    linked: all_there || worker.is_some(),
                });
            }
        }
        places
    }
}
