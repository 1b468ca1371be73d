//! Schemas, expressions and grammars compiled in a process of their own first, which may die of them.
//!
//! The compiler bounds most of what it does, and not all: a text of a few kilobytes may ask for minutes, gigabytes or a
//! deep recursion. What the process ([`super::helper`]) survives within its limits, the worker compiles again for its
//! model's vocabulary; the process uses one of single bytes, which takes no more than that.

use std::io;
use std::path::Path;

use common::request::Constraint;
use llguidance::ParserFactory;
use llguidance::toktrie::ApproximateTokEnv;

use super::constraint::{compile, factory_over, with_stack};
use super::helper::{self, Death, Helper};

/// The program's argument that makes it [`serve`].
pub const TASK: &str = "try-grammar";
/// Stack of a compilation here; the worker's own has more, so that what this one survives, that one does.
const STACK_BYTES: usize = 4 << 20;

/// The process that tries.
pub struct Trial {
    helper: Helper,
}

/// Why a source is not to be compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubt {
    /// It does not compile, or not within the limits.
    Refused(String),
    /// It could not be tried.
    Untried(String),
}

impl Trial {
    /// Tries by this same program.
    pub fn of_this_program() -> Trial {
        Trial::new(Path::new(helper::THIS_PROGRAM))
    }

    /// Tries by a worker's program.
    pub fn new(program: &Path) -> Trial {
        Trial {
            helper: Helper::new(program, TASK, "grammar-trial", Vec::new()),
        }
    }

    /// Whether a source compiles within the limits.
    ///
    /// # Errors
    /// [`Doubt`].
    pub fn compile(&self, constraint: &Constraint) -> Result<(), Doubt> {
        let untried = |e: serde_json::Error| Doubt::Untried(e.to_string());
        let question = serde_json::to_vec(constraint).map_err(untried)?;
        let reply = self.helper.ask(question).map_err(|death| match death {
            Death::NotStarted(why) => Doubt::Untried(why),
            Death::Slow(s) => Doubt::Refused(format!("compiling it takes more than {s} s")),
            Death::Memory(mib) => Doubt::Refused(format!(
                "compiling it takes more than {mib} MiB, or too deep a recursion"
            )),
            Death::Broke(how) => Doubt::Refused(format!("compiling it breaks the compiler: {how}")),
        })?;
        let outcome: Result<(), String> = serde_json::from_slice(&reply).map_err(untried)?;
        outcome.map_err(Doubt::Refused)
    }
}

/// The process's own part: answers each constraint with nothing, or with the reason why it does not compile.
///
/// # Errors
/// As [`helper::serve`].
pub fn serve() -> io::Result<()> {
    helper::serve(|_| {
        let environment = ApproximateTokEnv::single_byte_env();
        let factory: ParserFactory = factory_over(&environment).map_err(io::Error::other)?;
        Ok(move |question: &[u8]| {
            let constraint: Constraint = serde_json::from_slice(question)?;
            let outcome = with_stack(STACK_BYTES, || compile(&factory, &constraint).map(drop))?;
            Ok(serde_json::to_vec(&outcome)?)
        })
    })
}
