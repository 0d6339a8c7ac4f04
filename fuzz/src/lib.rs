//! Hostile inputs for `lingrad-core`: none may panic, hang, or give a result that is not finite where that is promised.
//!
//! Only what the functions' documentation asks for is kept to. Input `i` of a seed is always the same.

mod source;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, Once, PoisonError};

use source::{Random, Source};
pub use targets::TARGETS;

/// Bytes that an input is made of; what it still needs afterwards is 0.
const BYTES: usize = 2048;

/// The last panic, as its hook has it.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// What is wrong, in one line that tells kinds of finds apart.
pub type Find = String;

/// Computes an input, and prints what it is where that is `told`: the number of its target, and what is wrong.
pub fn run(seed: u64, index: u64, told: bool) -> (usize, Option<Find>) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let text = info.to_string().replace('\n', " ");
            PANIC.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
        }));
    });
    let mut random = Random::new(seed, index);
    let mut bytes = [0; BYTES];
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.bits().to_le_bytes()));
    let weights: usize = TARGETS.iter().map(|target| target.weight).sum();
    let mut at = random.bits() as usize % weights;
    let target = TARGETS.iter().position(|target| match at.checked_sub(target.weight) {
        Some(left) => {
            at = left;
            false
        }
        None => true,
    });
    let target = target.unwrap_or(0);
    let outcome = catch_unwind(AssertUnwindSafe(|| (TARGETS[target].run)(&mut Source::new(&bytes, told))));
    let find = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(text)) => Some(text),
        Err(_) => Some(PANIC.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()),
    };
    (target, find.map(|text| format!("{}: {text}", TARGETS[target].name)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_input_panics_or_gives_what_is_not_finite() {
        for index in 0..2000 {
            if let (_, Some(find)) = super::run(0, index, false) {
                panic!("--seed 0 --only {index}: {find}");
            }
        }
    }
}
