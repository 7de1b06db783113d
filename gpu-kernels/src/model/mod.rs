//! A model's forward pass between its matrix products and the stages: what goes through it element by element.

mod argmax;
mod elements;
mod embed;
mod rms_norm;
mod rotate;
mod sample;
mod shares;
mod sin_cos;
mod swiglu;

pub use argmax::argmax;
pub use embed::embed;
pub use rms_norm::rms_norm;
pub use rotate::rotate;
pub use sample::sample;
pub use sin_cos::sin_cos;
pub use swiglu::swiglu;
//! The model around attention.

mod fill_random;

pub use fill_random::fill_random;
