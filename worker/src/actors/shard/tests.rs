//! Turns of prompts to be tokenized.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// A job that tells whether it has run.
fn job(turns: &Turns, prompt: &Prompt) -> (PromptJob, Arc<AtomicBool>) {
    let ran = Arc::new(AtomicBool::new(false));
    let job = PromptJob {
        key: 1,
        turns: turns.of(prompt).clone(),
        dropped: CancellationToken::new(),
        work: Box::new({
            let ran = ran.clone();
            move || {
                ran.store(true, Ordering::SeqCst);
                Err(internal("nothing to prepare"))
            }
        }),
    };
    (job, ran)
}

#[actix::test]
async fn short_prompts_and_ids_pass_long_prompts_that_wait() {
    let turns = Turns::default();
    let long = Prompt::Text("a".repeat(LONG_BYTES + 1));
    let _taken = turns.of(&long).acquire().await.unwrap();
    for short in [
        Prompt::Text("a".repeat(LONG_BYTES)),
        Prompt::Tokens(vec![1; LONG_BYTES + 1]),
    ] {
        let (job, ran) = job(&turns, &short);
        job.run().await;
        assert!(ran.load(Ordering::SeqCst));
    }
    let (waiting, ran) = job(&turns, &long);
    let mut waiting = Box::pin(waiting.run());
    assert!(futures::poll!(&mut waiting).is_pending());
    assert!(!ran.load(Ordering::SeqCst));
}

#[actix::test]
async fn a_prompt_that_nobody_wants_any_more_gives_up_its_place_and_is_not_tokenized() {
    let turns = Turns::default();
    let long = Prompt::Text("a".repeat(LONG_BYTES + 1));
    let taken = turns.of(&long).clone().acquire_owned().await.unwrap();
    let (job, ran) = job(&turns, &long);
    let dropped = job.dropped.clone();
    let mut waiting = Box::pin(job.run());
    assert!(futures::poll!(&mut waiting).is_pending());
    drop(taken);
    dropped.cancel();
    let failure = waiting.await.prepared.err().unwrap();
    assert!(failure.message.contains("cancelled"), "{failure:?}");
    assert!(!ran.load(Ordering::SeqCst));
    assert_eq!(turns.of(&long).available_permits(), 1);
}
