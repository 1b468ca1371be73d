//! One message of every form, with every field told apart from its neighbours.

use super::*;

fn text(name: &str) -> String {
    name.to_owned()
}

fn token_logprob() -> TokenLogprob {
    TokenLogprob {
        id: 300,
        bytes: vec![0xc3, 0xa9],
        logprob: Some(-0.5),
        top: vec![TopToken {
            id: 301,
            bytes: vec![0x20],
            logprob: -1.5,
        }],
    }
}

fn shard_spec() -> ShardSpec {
    let member = |name: &str| GroupMember {
        worker: WorkerId(text(name)),
        group_address: text("127.0.0.1:7"),
    };
    ShardSpec {
        replica: ReplicaId(2),
        generation: Generation(3),
        rank: 1,
        members: vec![member("n/0"), member("n/1")],
        group_key: [0xab; 32],
        source: ModelSource::Folder(text("/m")),
        options: ShardOptions {
            kv_dtype: KvDtype::F32,
            quantization: Quantization::Int4,
            kv_blocks: 100,
            step_tokens_max: 512,
            sequences_max: 64,
            context_max: 2048,
            memory_bytes: 1 << 33,
        },
    }
}

fn start(prompt: Prompt) -> Command {
    let generate = Generate {
        prompt,
        sampling: Sampling {
            temperature: 0.5,
            top_k: 40,
            top_p: 0.75,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: -1.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(9, -4.0)],
            seed: u64::MAX,
        },
        stop: Stop {
            strings: vec![text("END")],
            token_ids: vec![2],
            ignore_eos: true,
            tokens_max: Some(16),
        },
        candidates: 2,
        logprobs: Some(3),
        prompt_logprobs: None,
        echo: true,
        constraint: Some(Constraint::Regex(text("a+"))),
        truncate_prompt: true,
        embedding: true,
    };
    let start = Start {
        request: RequestId(300),
        replica: ReplicaId(2),
        generation: Generation(3),
        attempt: 1,
        generate,
        resume: vec![Resume {
            candidate: 0,
            emitted: vec![4, 5],
            delivered_bytes: 6,
        }],
        deadline_ms: Some(1000),
    };
    Command::Start {
        term: Term(7),
        start: Box::new(start),
    }
}

/// Every form of [`Command`], by name.
pub(crate) fn commands() -> Vec<(&'static str, Command)> {
    let chat = Chat {
        messages: vec![ChatMessage {
            role: text("user"),
            content: text("hi"),
            tool_calls: Some(text("[]")),
            tool_call_id: Some(text("c1")),
            name: Some(text("f")),
        }],
        tools: Some(text("[{}]")),
        tool_choice: ToolChoice::Function(text("f")),
        single_call: true,
    };
    let remote = ShardSpec {
        source: ModelSource::Remote(RemoteModel {
            registry: text("r"),
            uri: text("u:/m"),
            identity: text("v1"),
            files: vec![RemoteFile {
                path: text("a/b"),
                bytes: Some(300),
                sha256: Some(text("ab")),
            }],
        }),
        ..shard_spec()
    };
    vec![
        (
            "welcome",
            Command::Welcome {
                protocol: 1,
                term: Term(7),
            },
        ),
        (
            "load",
            Command::Load {
                term: Term(7),
                shard: Box::new(shard_spec()),
            },
        ),
        (
            "load remote",
            Command::Load {
                term: Term(7),
                shard: Box::new(remote),
            },
        ),
        (
            "unload",
            Command::Unload {
                term: Term(7),
                replica: ReplicaId(2),
                generation: Generation(3),
                keep: true,
            },
        ),
        ("start text", start(Prompt::Text(text("Hello")))),
        ("start tokens", start(Prompt::Tokens(vec![1, 70_000]))),
        ("start chat", start(Prompt::Chat(chat))),
        (
            "cancel",
            Command::Cancel {
                request: RequestId(300),
            },
        ),
        ("ping", Command::Ping { nonce: 8 }),
        ("refused", Command::Refused { reason: text("no") }),
    ]
}

fn shard(state: ShardState) -> Report {
    Report::Shard {
        replica: ReplicaId(2),
        generation: Generation(3),
        rank: 1,
        state,
    }
}

fn step(output: Output) -> Report {
    Report::Step {
        replica: ReplicaId(2),
        generation: Generation(3),
        outputs: vec![output],
    }
}

fn end(end: End) -> Report {
    step(Output::End {
        request: RequestId(5),
        candidate: 1,
        output_tokens: 9,
        cached_tokens: 32,
        end,
    })
}

fn ended_by(kind: FailureKind) -> Report {
    end(End::Error(Failure::new(kind, "x")))
}

fn hello() -> Report {
    let held = HeldShard {
        replica: ReplicaId(2),
        generation: Generation(3),
        rank: 1,
        state: ShardState::Unloaded,
    };
    Report::Hello(Box::new(Hello {
        protocol_min: 1,
        protocol_max: 2,
        secret: text("s3"),
        worker: WorkerId(text("n/0")),
        boot: BootId(6),
        device: Device {
            kind: DeviceKind::Cuda,
            name: text("gpu"),
            memory_bytes: 1 << 20,
            threads: 4,
            rates: Some(DeviceRates {
                bytes_per_s: 300,
                flops_per_s: 70_000,
            }),
        },
        group_address: text("h:1"),
        shards: vec![held],
    }))
}

/// Every form of [`Report`], by name.
pub(crate) fn reports() -> Vec<(&'static str, Report)> {
    let loading = ShardState::Loading {
        stage: text("reading"),
        done_bytes: 10,
        total_bytes: 300,
    };
    let ready = ShardState::Ready(Box::new(ReadyShard {
        numerics_id: 11,
        task: Some(text("t")),
        chat: true,
        context_max: 2048,
        kv_blocks: 100,
        weight_bytes: 1 << 20,
        load_ms: 12,
    }));
    let failed = ShardState::Failed(Failure::new(FailureKind::Internal, "x"));
    let prompt = Output::Prompt {
        request: RequestId(5),
        text: text("p"),
        tokens: vec![token_logprob()],
    };
    let delta = Output::Delta {
        request: RequestId(5),
        delta: Delta {
            candidate: 1,
            ids: vec![9],
            text: text("hi"),
            logprobs: vec![token_logprob()],
            tool_calls: vec![ToolCallDelta {
                index: 1,
                id: Some(text("c1")),
                name: Some(text("f")),
                arguments: text("{}"),
            }],
        },
    };
    let embedding = Output::Embedding {
        request: RequestId(5),
        values: vec![0.5, -1.0],
    };
    let log = |phase| Report::Log {
        replica: ReplicaId(2),
        generation: Generation(3),
        rank: 1,
        lines: vec![LogLine {
            at_ms: 300,
            phase,
            text: text("x"),
        }],
    };
    let health = Report::Health {
        replica: ReplicaId(2),
        generation: Generation(3),
        health: Health {
            steps: 1,
            running: 2,
            waiting: 3,
            waiting_tokens: 4,
            kv_blocks_used: 5,
            kv_blocks_total: 6,
            prefix_queries: 7,
            prefix_hits: 8,
            preemptions: 9,
            prompt_tokens: 10,
            output_tokens: 11,
            step_us: vec![12, 13],
            stalled: true,
        },
    };
    vec![
        ("hello", hello()),
        ("shard loading", shard(loading)),
        ("shard ready", shard(ready)),
        ("shard failed", shard(failed)),
        ("shard unloaded", shard(ShardState::Unloaded)),
        (
            "accepted",
            Report::Accepted {
                request: RequestId(5),
                attempt: 1,
                prompt_tokens: 36,
            },
        ),
        (
            "rejected",
            Report::Rejected {
                request: RequestId(5),
                attempt: 1,
                failure: Failure::new(FailureKind::BadRequest, "x"),
            },
        ),
        ("step prompt", step(prompt)),
        ("step delta", step(delta)),
        ("step embedding", step(embedding)),
        ("end stop", end(End::Stop)),
        ("end length", end(End::Length)),
        ("end deadline", end(End::Deadline)),
        ("end cancelled", end(End::Cancelled)),
        ("end bad request", ended_by(FailureKind::BadRequest)),
        ("end too large", ended_by(FailureKind::TooLarge)),
        ("end overloaded", ended_by(FailureKind::Overloaded)),
        ("end unavailable", ended_by(FailureKind::Unavailable)),
        ("end internal", ended_by(FailureKind::Internal)),
        ("health", health),
        ("pong", Report::Pong { nonce: 8 }),
        ("log build", log(LogPhase::Build)),
        ("log run", log(LogPhase::Run)),
    ]
}
