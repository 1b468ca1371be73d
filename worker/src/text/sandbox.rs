//! Chat templates rendered in a process of their own, which may die of them.
//!
//! Jinja has no limits on memory and time: a few operations double a text without end, and a single one may ask for
//! gigabytes. Each model has its process ([`super::helper`]), so that a template holds up its own model alone. What a
//! rendering is, is [`super::chat`]'s part.

use std::io;
use std::path::Path;

use common::request::Chat;

use super::Render;
use super::chat::{ChatError, ChatTemplate, TemplateSource};
use super::helper::{self, Death, Helper};

/// The program's argument that makes it [`serve`].
pub const TASK: &str = "render-template";

/// A model's chat template and the process that renders it.
pub struct Sandbox {
    /// `None` for a model without a template.
    helper: Option<Helper>,
}

impl Sandbox {
    /// Renders by this same program.
    pub fn of_this_program(template: TemplateSource) -> Sandbox {
        Sandbox::new(Path::new(helper::THIS_PROGRAM), template)
    }

    /// Renders by a worker's program.
    pub fn new(program: &Path, template: TemplateSource) -> Sandbox {
        // A template is texts, and texts are always JSON.
        let first = serde_json::to_vec(&template).unwrap_or_default();
        let helper = || Helper::new(program, TASK, "chat-template", first);
        Sandbox {
            helper: template.text.is_some().then(helper),
        }
    }
}

impl Render for Sandbox {
    fn render(&self, chat: &Chat) -> Result<String, ChatError> {
        let helper = self.helper.as_ref().ok_or(ChatError::Missing)?;
        let conversation = serde_json::to_vec(chat).map_err(unreadable)?;
        let reply = helper.ask(conversation).map_err(|death| match death {
            Death::NotStarted(why) => ChatError::Sandbox(why),
            Death::Slow(s) => ChatError::Slow(s),
            Death::Memory(mib) => ChatError::Memory(mib),
            Death::Broke(how) => ChatError::Broke(how),
        })?;
        serde_json::from_slice(&reply).map_err(unreadable)?
    }
}

fn unreadable(error: serde_json::Error) -> ChatError {
    ChatError::Sandbox(error.to_string())
}

/// The process's own part: answers each conversation with a prompt or a [`ChatError`].
///
/// # Errors
/// As [`helper::serve`].
pub fn serve() -> io::Result<()> {
    helper::serve(|template| {
        let template = ChatTemplate::new(serde_json::from_slice(template)?);
        Ok(move |conversation: &[u8]| {
            let chat: Chat = serde_json::from_slice(conversation)?;
            Ok(serde_json::to_vec(&template.render(&chat))?)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_cannot_be_started_is_no_fault_of_the_request() {
        let template = TemplateSource {
            text: Some("x".into()),
            ..Default::default()
        };
        let nowhere = Sandbox::new(Path::new("/nowhere/worker"), template);
        let error = nowhere.render(&Chat::default()).unwrap_err();
        assert!(
            matches!(&error, ChatError::Sandbox(why) if why.contains("does not start")),
            "{error}"
        );
    }
}
