//! What is sent, and when: a closed loop, where each client sends its next request when the last one is answered, or an
//! open one, where requests come whatever becomes of the others.
//!
//! A request's prompt and lengths follow from the seed and its number alone: two systems get the very same load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::arrivals;
use crate::client::{Answer, Ask, Client, Failure};
use crate::length::Length;
use crate::prompt::Prompts;

/// Requests of an open loop that may be unanswered at a time: beyond, a generator runs out of ports before long.
const OPEN_MAX: usize = 4096;

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loop {
    /// So many clients, one request each at a time.
    Closed(u32),
    /// So many requests a second on average.
    Open(f64),
}

/// A load.
#[derive(Debug, Clone)]
pub struct Load {
    /// Who sends.
    pub loop_: Loop,
    /// Requests in all.
    pub requests: u64,
    /// No request begins later than this.
    pub time_max: Option<Duration>,
    /// Lengths of prompts.
    pub prompt: Length,
    /// Lengths of answers.
    pub output: Length,
    /// The prompts.
    pub prompts: Prompts,
}

/// What became of a request.
#[derive(Debug, Clone)]
pub struct Record {
    /// When it was sent, since the beginning of the load. An open loop's: when it was due, so that a generator that
    /// comes late does not hide what a user would have waited for.
    pub start: Duration,
    /// When it was over, answered or not, since the beginning of the load.
    pub over: Duration,
    /// How it ended.
    pub end: Result<Answer, Failure>,
}

impl Load {
    /// The request of a number.
    #[must_use]
    pub fn ask(&self, number: u64) -> Ask {
        let mut random = StdRng::seed_from_u64(self.prompts.seed.wrapping_add(number << 20));
        let prompt_tokens = self.prompt.draw(&mut random);
        Ask {
            prompt: self.prompts.make(number, prompt_tokens),
            prompt_tokens,
            output_tokens: self.output.draw(&mut random),
        }
    }

    /// Sends it all and waits for every answer. Records come in no order.
    pub async fn run(&self, client: &Client) -> Vec<Record> {
        match self.loop_ {
            Loop::Closed(clients) => self.closed(client, clients).await,
            Loop::Open(rate) => self.open(client, rate).await,
        }
    }

    async fn closed(&self, client: &Client, clients: u32) -> Vec<Record> {
        let (next, begun) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let load = Arc::new(self.clone());
        let mut tasks = JoinSet::new();
        for _ in 0..clients {
            let (client, next, load) = (client.clone(), Arc::clone(&next), Arc::clone(&load));
            tasks.spawn(async move {
                let mut records = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= load.requests || load.is_over(begun.elapsed()) {
                        return records;
                    }
                    let ask = load.ask(number);
                    let start = begun.elapsed();
                    let end = client.ask(&ask).await;
                    let over = begun.elapsed();
                    records.push(Record { start, over, end });
                }
            });
        }
        tasks.join_all().await.into_iter().flatten().collect()
    }

    async fn open(&self, client: &Client, rate: f64) -> Vec<Record> {
        let mut random = StdRng::seed_from_u64(self.prompts.seed);
        let (begun, mut records, mut tasks) = (Instant::now(), Vec::new(), JoinSet::new());
        for (number, start) in (0..self.requests).zip(arrivals::poisson(rate, &mut random)) {
            if self.is_over(start) {
                break;
            }
            let ask = self.ask(number);
            sleep_until(begun + start).await;
            while let Some(Ok(record)) = tasks.try_join_next() {
                records.push(record);
            }
            if tasks.len() >= OPEN_MAX {
                let end = Err(Failure::Overrun);
                let over = start;
                records.push(Record { start, over, end });
                continue;
            }
            let client = client.clone();
            tasks.spawn(async move {
                let late = begun.elapsed().saturating_sub(start);
                let end = client.ask(&ask).await.map(|answer| delayed(answer, late));
                let over = begun.elapsed();
                Record { start, over, end }
            });
        }
        records.extend(tasks.join_all().await);
        records
    }

    fn is_over(&self, elapsed: Duration) -> bool {
        self.time_max.is_some_and(|time_max| elapsed >= time_max)
    }
}

/// The answer to a request that was due so long before it was sent.
fn delayed(mut answer: Answer, late: Duration) -> Answer {
    answer.parts.iter_mut().for_each(|part| *part += late);
    answer.end += late;
    answer
}
