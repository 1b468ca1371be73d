//! Checkpoints that other tools quantised, served by a whole cluster: a user gets what the engine makes of them.

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, TOKENS_MAX};
use cluster_tests::settings::{Model, Settings};

use crate::engine_alone::EngineAlone;
use crate::logs::says;
use crate::quantiser::{Quantiser, quantised};

const MODEL: &str = "tiny-llama";

/// What is served, and what the build log says of it.
const FORMS: [(&str, Quantiser, &str); 4] = [
    ("gptq", Quantiser::GPTQ, "16 of 16 are kept as they are"),
    (
        "gptq-8",
        Quantiser {
            bits: 8,
            ..Quantiser::GPTQ
        },
        "16 of 16 are kept as they are",
    ),
    (
        "gptq-by-index",
        Quantiser {
            by_index: true,
            ..Quantiser::GPTQ
        },
        "0 of 16 are kept as they are",
    ),
    ("awq", Quantiser::AWQ, "16 of 16 are kept as they are"),
];

#[tokio::test]
async fn folders_of_gptq_and_awq_answer_as_the_engine_alone_does() {
    let folders = FORMS.map(|(name, quantiser, note)| {
        let folder = quantised(&golden::model_folder(MODEL), quantiser);
        (name, folder, note)
    });
    let mut settings = Settings::new();
    for (name, folder, _) in &folders {
        settings = settings.model(Model::at(&format!("ml.demo.{name}"), folder.path()));
    }
    let cluster = Cluster::start(settings).await;
    let client = &cluster.client;
    let goldens = golden::exact(MODEL);
    for (name, folder, note) in &folders {
        client.deploy(name, name).await;
        says(&cluster, name, &format!("{name}-1"), "build-logs", &[note]).await;
        let mut alone = EngineAlone::load(folder.path());
        let mut as_floats = 0;
        for golden in &goldens {
            let text = client.continue_text(name, &golden.prompt, TOKENS_MAX).await;
            let expected = alone.continue_ids(&golden.input_ids, TOKENS_MAX);
            assert_eq!(text, expected, "{name}: {}", golden.name);
            as_floats += usize::from(text == golden.text);
        }
        // 8 bits change next to nothing: both could not be wrong alike.
        let enough = if *name == "gptq-8" {
            goldens.len() * 4 / 5
        } else {
            0
        };
        assert!(
            as_floats >= enough,
            "{as_floats} of {} in {name}",
            goldens.len()
        );
    }
}
