//! The unmodified worker on emulated GPUs (`cuda-rig`): its answers against those of transformers and of the CPU.
//!
//! Nothing here says anything of speed. Emulated steps are slow: prompts are short, and answers of few tokens.

use cluster_tests::cluster::Cluster;
use cluster_tests::fake_coordinator::{FakeCoordinator, Link, start};
use cluster_tests::golden::{self, FAMILIES, Golden};
use cluster_tests::settings::{Model, Settings};
use common::ids::{RequestId, Term};
use common::request::{End, Generate, Prompt, Stop};
use common::wire::message::{Command, Report, ShardSpec, ShardState};
use serde_json::{Value, json};

/// Below this gap between the two best tokens, bf16 on the way through the layers may choose the other one.
const MARGIN: f64 = 0.5;
/// Tokens of an answer.
const TOKENS: u32 = 8;
/// A log-probability of the CPU and one of a GPU differ by no more: both have bf16 weights, and a GPU rounds the inputs of
/// its products to bf16 too.
const TOLERANCE: f64 = 0.1;

/// So many emulated GPUs beside a CPU.
pub fn settings(gpus: usize) -> Settings {
    Settings::with_workers(1).gpus(gpus, cuda_rig::env())
}

/// Goldens whose best token is so for sure, the shortest prompts first.
fn clear(model: &str) -> Vec<Golden> {
    let mut goldens = golden::all(model);
    goldens.retain(|golden| golden.min_margin > MARGIN && golden.text.len() > 1);
    goldens.sort_by_key(|golden| golden.input_ids.len());
    assert!(
        goldens.len() >= 3,
        "{model} has {} clear goldens",
        goldens.len()
    );
    goldens
}

/// Asks for the beginning of a golden's text.
async fn begins(cluster: &Cluster, endpoint: &str, golden: &Golden) {
    let body = json!({"prompt": golden.prompt, "max_tokens": TOKENS, "temperature": 0});
    let answer = cluster.client.invoke(endpoint, &body).await.ok();
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(
        !text.is_empty() && golden.text.starts_with(text),
        "{endpoint}, prompt {}: {text:?} does not begin {:?}",
        golden.name,
        golden.text
    );
}

/// The log-probabilities of a prompt's tokens, the first left out.
async fn scores(cluster: &Cluster, endpoint: &str, prompt: &[u32]) -> Vec<f64> {
    let body =
        json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1, "temperature": 0});
    let answer = cluster.client.invoke(endpoint, &body).await.ok();
    let scores = answer["choices"][0]["logprobs"]["token_logprobs"].clone();
    let scores = scores.as_array().unwrap()[1..].iter();
    scores.map(|score| score.as_f64().unwrap()).collect()
}

/// Tokens in no order that the models know: their log-probabilities show more than those of a text learnt by heart.
fn babble() -> Vec<u32> {
    (0..48).map(|i| 300 + i * 7919 % 1700).collect()
}

fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() <= tolerance,
            "{what}, token {i}: {got} against {expected}"
        );
    }
}

/// Creates an endpoint whose weights are kept as said.
async fn deploy_quantised(cluster: &Cluster, name: &str, workload_type: &str, quantization: &str) {
    cluster
        .client
        .post(
            "/api/2.0/serving-endpoints",
            &quantised(name, workload_type, quantization),
        )
        .await
        .ok();
    cluster.client.wait_ready(name).await;
}

fn quantised(name: &str, workload_type: &str, quantization: &str) -> Value {
    json!({"name": name, "config": {"served_entities": [{
        "entity_name": "ml.demo.tiny-llama", "entity_version": 1, "workload_type": workload_type,
        "scale_to_zero_enabled": false, "quantization": quantization}]}})
}

#[tokio::test]
async fn one_gpu_and_two_answer_as_transformers_and_score_as_the_cpu() {
    let cluster = Cluster::start(settings(2)).await;
    for model in FAMILIES {
        let goldens = clear(model);
        let on = |kind: &str| format!("{model}-{kind}");
        let types = [("cpu", "CPU"), ("gpu", "GPU"), ("pair", "GPU_2")];
        for (kind, workload_type) in types {
            cluster
                .client
                .deploy_on(&on(kind), model, workload_type, "Small")
                .await;
        }
        let scored = babble();
        let expected = scores(&cluster, &on("cpu"), &scored).await;
        for kind in ["gpu", "pair"] {
            for golden in &goldens[..2] {
                begins(&cluster, &on(kind), golden).await;
            }
            let got = scores(&cluster, &on(kind), &scored).await;
            assert_close(&on(kind), &got, &expected, TOLERANCE);
        }
        for (kind, _) in types {
            let path = format!("/api/2.0/serving-endpoints/{}", on(kind));
            let delete = reqwest::Method::DELETE;
            cluster.client.call(delete, &path, &Value::Null).await.ok();
        }
    }
}

#[tokio::test]
async fn steps_that_are_replayed_give_the_tokens_of_steps_that_are_not() {
    let mut answers = Vec::new();
    for lines in ["graphs = true", "graphs = false"] {
        let cluster = Cluster::start(settings(1).gpu_lines(&[lines])).await;
        cluster
            .client
            .deploy_on("gpu", "tiny-llama", "GPU", "Small")
            .await;
        // Several at a time, drawn and greedy: sizes come and go, and come again.
        let asked = clear("tiny-llama")[..3].to_vec();
        let bodies: Vec<Value> = asked
            .iter()
            .zip([0.0, 1.0, 0.7])
            .map(|(golden, temperature)| {
                json!({"prompt": golden.prompt, "max_tokens": 2 * TOKENS, "temperature": temperature, "seed": 3,
                       "top_k": 20, "ignore_eos": true})
            })
            .collect();
        let calls = bodies.iter().map(|body| cluster.client.invoke("gpu", body));
        let together = futures::future::join_all(calls).await;
        let texts: Vec<Value> = together
            .iter()
            .map(|reply| reply.ok()["choices"][0]["text"].clone())
            .collect();
        assert!(
            asked[0].text.starts_with(texts[0].as_str().unwrap()),
            "{texts:?}"
        );
        answers.push(texts);
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test]
async fn with_batch_invariant_an_answer_is_the_same_alone_and_in_a_crowd() {
    let cluster = Cluster::start(settings(1).gpu_lines(&["batch_invariant = true"])).await;
    cluster
        .client
        .deploy_on("gpu", "tiny-llama", "GPU", "Small")
        .await;
    let body = |prompt: &str, seed: u64| {
        json!({"prompt": prompt, "max_tokens": TOKENS, "temperature": 1, "seed": seed, "logprobs": 3,
               "ignore_eos": true})
    };
    let choice = |reply: cluster_tests::client::Reply| reply.ok()["choices"][0].clone();
    let (mine, goldens) = (body("Once upon a time", 7), clear("tiny-llama"));
    let alone = choice(cluster.client.invoke("gpu", &mine).await);
    let crowd: Vec<Value> = (0..3).map(|i| body(&goldens[i].prompt, i as u64)).collect();
    let others = crowd.iter().map(|body| cluster.client.invoke("gpu", body));
    let (again, _) = futures::join!(
        cluster.client.invoke("gpu", &mine),
        futures::future::join_all(others)
    );
    assert_eq!(choice(again), alone);
}

#[tokio::test]
async fn quantised_weights_answer_alike_on_one_gpu_and_two() {
    let cluster = Cluster::start(settings(2)).await;
    let goldens = clear("tiny-llama");
    let scored = babble();
    cluster.client.deploy("exact", "tiny-llama").await;
    let expected = scores(&cluster, "exact", &scored).await;
    // What rounding to so few bits costs these log-probabilities, of 5 to 22, at most: 0.1 and 1.5.
    for (quantization, tolerance) in [("int8", 0.2), ("int4", 2.5)] {
        let names = ["one", "two"].map(|ranks| format!("{quantization}-{ranks}"));
        deploy_quantised(&cluster, &names[0], "GPU", quantization).await;
        deploy_quantised(&cluster, &names[1], "GPU_2", quantization).await;
        let one = scores(&cluster, &names[0], &scored).await;
        assert_close(&names[0], &one, &expected, tolerance);
        assert_ne!(one, expected, "{quantization}: nothing was rounded");
        let two = scores(&cluster, &names[1], &scored).await;
        // Ranks have the very numbers of the whole: only the order of additions differs.
        assert_close(&names[1], &two, &one, TOLERANCE);
    }
    begins(&cluster, "int8-one", &goldens[0]).await;
}

/// A shard with a small cache and short steps, loaded by a coordinator that the test plays.
async fn small_shard(
    coordinator: &FakeCoordinator,
    kv_blocks: u32,
    steps: u32,
) -> (Link, ShardSpec) {
    let mut link = coordinator.welcomed(1).await;
    let mut spec = Link::shard(&golden::model_folder("tiny-llama"), vec![link.member()], 0);
    spec.options.kv_blocks = kv_blocks;
    spec.options.step_tokens_max = steps;
    spec.options.sequences_max = 4;
    spec.options.memory_bytes = 256 << 20;
    link.send(Command::Load {
        term: Term(1),
        shard: Box::new(spec.clone()),
    })
    .await;
    let state = link.loaded(&spec).await;
    assert!(matches!(state, ShardState::Ready(_)), "{state:?}");
    (link, spec)
}

fn generate(golden: &Golden, tokens: u32) -> Generate {
    Generate {
        stop: Stop {
            tokens_max: Some(tokens),
            ignore_eos: true,
            ..Stop::default()
        },
        ..Generate::new(Prompt::Text(golden.prompt.clone()))
    }
}

async fn ask(link: &mut Link, spec: &ShardSpec, request: u64, generate: Generate) {
    link.send(Command::Start {
        term: Term(1),
        start: Box::new(start(spec, request, generate)),
    })
    .await;
}

/// The first counters that `is` wants, as the worker reports them.
async fn counted(link: &mut Link, what: &str, is: impl Fn(&common::wire::message::Health) -> bool) {
    link.wait(what, |report| match report {
        Report::Health { health, .. } if is(&health) => Some(()),
        _ => None,
    })
    .await;
}

#[tokio::test]
async fn prompts_in_chunks_and_prefixes_that_are_cached_change_no_token() {
    let settings = Settings::with_workers(0).gpus(1, cuda_rig::env());
    let coordinator = FakeCoordinator::listen(settings).await;
    let _worker = coordinator.start_worker(0);
    // Steps of sixteen tokens: every prompt takes several.
    let (mut link, spec) = small_shard(&coordinator, 33, 16).await;
    let goldens = clear("tiny-llama");
    let several = |golden: &&Golden| golden.input_ids.len() > 40 && golden.output_ids.len() > 40;
    let golden = goldens
        .iter()
        .find(several)
        .expect("a clear golden that is long");
    for request in 0..2 {
        ask(&mut link, &spec, request, generate(golden, TOKENS)).await;
        let (text, end) = link.answer(RequestId(request)).await;
        assert!(
            !text.is_empty() && golden.text.starts_with(&text),
            "{text:?}"
        );
        assert_eq!(end, End::Length);
    }
    counted(&mut link, "a prefix to be found", |health| {
        health.prefix_hits >= 32
    })
    .await;
}

#[tokio::test]
async fn sequences_that_are_put_back_for_want_of_memory_go_on_as_if_they_were_not() {
    let settings = Settings::with_workers(0).gpus(1, cuda_rig::env());
    let coordinator = FakeCoordinator::listen(settings).await;
    let _worker = coordinator.start_worker(0);
    // Each needs three blocks or more in the end; there are five.
    let (mut link, spec) = small_shard(&coordinator, 6, 64).await;
    let goldens: Vec<Golden> = clear("tiny-llama")
        .into_iter()
        .filter(|golden| golden.input_ids.len() < 32 && golden.output_ids.len() >= 32)
        .take(2)
        .collect();
    assert_eq!(goldens.len(), 2);
    for (request, golden) in (0..).zip(&goldens) {
        ask(&mut link, &spec, request, generate(golden, 32)).await;
    }
    let texts = link.answers(&[RequestId(0), RequestId(1)]).await;
    for (golden, (text, end)) in goldens.iter().zip(texts) {
        assert!(
            !text.is_empty() && golden.text.starts_with(&text),
            "{text:?}"
        );
        assert_eq!(end, End::Length);
    }
    counted(&mut link, "a preemption", |health| health.preemptions > 0).await;
}

#[tokio::test]
async fn memory_that_cluster_toml_does_not_give_is_what_the_driver_says_is_free() {
    // Only an emulated device is as large as a test wants it.
    if cuda_rig::on_hardware() {
        return;
    }
    let mut env = cuda_rig::env();
    env.push(("CUDA_EMU_MEMORY".into(), "3G".into()));
    let settings = Settings::with_workers(0).gpus(1, env);
    let coordinator = FakeCoordinator::listen(settings).await;
    let _worker = coordinator.start_worker(0);
    let link = coordinator.welcomed(1).await;
    let device = &link.hello.device;
    assert!(
        (1 << 30..=2 << 30).contains(&device.memory_bytes) && device.rates.is_some(),
        "{device:?}"
    );
}

#[tokio::test]
async fn kv_in_f32_is_refused_by_gpus_with_one_line() {
    let mut settings = settings(1);
    settings.models.push(Model {
        kv_dtype: Some("f32"),
        ..Model::at("ml.demo.f32", &golden::model_folder("tiny-llama"))
    });
    let cluster = Cluster::start(settings).await;
    let reply = cluster.client.create("f32", "f32", "GPU", "Small").await;
    reply.refused(400, "INVALID_PARAMETER_VALUE", &["f32", "CPUs alone"]);
}
