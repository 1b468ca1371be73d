//! Which of a version's files workers need: weights, sizes and the tokenizer. Pure.

use super::files::{Files, within};
use super::mlmodel::{Layout, MLMODEL};

/// What stands beside the weights.
const WEIGHTS_FILES: [&str; 2] = ["config.json", "generation_config.json"];
/// What a tokenizer may consist of.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// Their paths. `weights` are the safetensors and their index, or the GGUF file, in the weights' folder.
pub fn files(files: &dyn Files, layout: &Layout, weights: &[String]) -> Vec<String> {
    let mut needed = vec![MLMODEL.to_owned()];
    let beside = WEIGHTS_FILES.iter().copied();
    let weights = beside.chain(weights.iter().map(String::as_str));
    needed.extend(weights.map(|name| within(&layout.weights, name)));
    let tokenizer = TOKENIZER_FILES.iter();
    needed.extend(tokenizer.map(|name| within(&layout.tokenizer, name)));
    needed.retain(|path| files.has(path));
    needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::files::Folder;

    #[test]
    fn weights_sizes_and_tokenizer_are_needed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for path in [
            "MLmodel",
            "conda.yaml",
            "input_example.json",
            "model/config.json",
            "model/a.safetensors",
            "model/pytorch_model.bin",
            "model/modeling_custom.py",
            "components/tokenizer/tokenizer.json",
            "components/tokenizer/tokenizer.py",
        ] {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        let layout = Layout {
            weights: "model".into(),
            gguf: None,
            tokenizer: "components/tokenizer".into(),
            task: None,
        };
        let folder = Folder::open(folder.path()).unwrap();
        assert_eq!(
            files(&folder, &layout, &["a.safetensors".to_owned()]),
            [
                "MLmodel",
                "model/config.json",
                "model/a.safetensors",
                "components/tokenizer/tokenizer.json"
            ]
        );
    }
}
